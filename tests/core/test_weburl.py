"""A receiver's URL."""

from __future__ import annotations

import pytest

from agentqd.core.weburl import WebUrl, read_url


@pytest.mark.parametrize(
    ("url", "made", "host_header"),
    [
        ("http://box/x", WebUrl(False, "box", 80, "/x"), "box"), ("https://hooks.example", WebUrl(True, "hooks.example", 443, "/"), "hooks.example"),
        ("HTTPS://Hooks.Example:8443/a/../b?c=d&e", WebUrl(True, "hooks.example", 8443, "/a/../b?c=d&e"), "hooks.example:8443"), ("http://h:443/", WebUrl(False, "h", 443, "/"), "h:443"),
        ("http://[::1]:81/x", WebUrl(False, "::1", 81, "/x"), "[::1]:81"), ("http://127.0.0.1/%7Ea%20b", WebUrl(False, "127.0.0.1", 80, "/%7Ea%20b"), "127.0.0.1"),
        ("https://b\u00fccher.example/\u00fc?q=\u00fc", WebUrl(True, "xn--bcher-kva.example", 443, "/%C3%BC?q=%C3%BC"), "xn--bcher-kva.example"), ("http://h?x", WebUrl(False, "h", 80, "/?x"), "h"),
        ("http://my_box:8080/x", WebUrl(False, "my_box", 8080, "/x"), "my_box:8080"),
    ],
)  # fmt: skip
def test_a_url_is_taken_apart(url: str, made: WebUrl, host_header: str) -> None:
    assert read_url(url) == made
    assert made.host_header == host_header


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "begins neither"), ("ftp://xyzzy/x", "begins neither"), ("//xyzzy/x", "begins neither"), ("unix:/xyzzy", "begins neither"), ("http://", "no host"), ("http:///xyzzy", "no host"),
        ("http://a..xyzzy/", "no host"), (f"http://{'x' * 64}.xyzzy/", "no host"), ("http://xyzzy../", "no host"),
        ("http://u:xyzzy@h/x", "user or password"), ("http://xyzzy@h/x", "user or password"), ("http://@h/xyzzy", "user or password"), ("http://h:0/xyzzy", "no port"), ("http://h:66000/xyzzy", "cannot be read"),
        ("http://h:xyzzy/", "cannot be read"), ("http://h/x#xyzzy", "fragment"), ("http://h/x#", "fragment"), ("http://h/xyzzy y", "space"), ("http://h/x\r\nX: xyzzy", "space or a control"),
        ("http://[xyzzy]/", "cannot be read|no address"), ("http://xyzzy\\@h/", "no host|user"), ("http://a..\u00fc/xyzzy", "no host"), ("http://-xyzzy/", "no host"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_without_showing_it(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        read_url(url)
    assert "xyzzy" not in str(caught.value)
