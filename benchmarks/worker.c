/* The measured worker. Its first act is to look at the clock; then it appends the 8 bytes to the file argv[1]. */
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    int fd = argc > 1 ? open(argv[1], O_WRONLY | O_APPEND) : -1;
    return write(fd, &ns, sizeof ns) != sizeof ns;
}
