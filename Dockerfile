# agentqd in a container. BASE is any image with Python >= 3.11 and venv:
#   podman build --format docker -t agentqd .
#   podman build --build-arg BASE=debian-with-python .
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/agentqd
COPY pyproject.toml README.md LICENSE ./
COPY agentqd agentqd
RUN /opt/agentqd/bin/pip install --no-cache-dir --disable-pip-version-check .

FROM ${BASE}
COPY --from=build /opt/agentqd /opt/agentqd
COPY script/container-init /usr/local/bin/agentqd-container-init
RUN groupadd --gid 10001 agentqd \
 && useradd --uid 10001 --gid agentqd --create-home --shell /bin/sh agentqd \
 && install -d -m 0700 -o agentqd -g agentqd /var/lib/agentqd /run/agentqd
ENV PATH=/opt/agentqd/bin:/usr/local/bin:/usr/bin:/bin \
    AGENTQD_STATE_DIR=/var/lib/agentqd \
    AGENTQD_RUNTIME_DIR=/run/agentqd
USER agentqd
WORKDIR /home/agentqd
VOLUME /var/lib/agentqd
# Not tini: PID 1 must also start the daemon again when it dies, so that its workers outlive it.
ENTRYPOINT ["/usr/local/bin/agentqd-container-init"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s CMD ["agentqctl", "status", "--json"]
