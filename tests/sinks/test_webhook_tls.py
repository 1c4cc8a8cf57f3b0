"""The webhook over TLS: certificates that are good, and those that are not."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agentqd.core.units import Duration
from agentqd.sinks.base import Deferred, Delivered

from .conformance import ids, open_descriptors, some
from .httpreceiver import Exchange, Receiver, closes_the_next, early, good, raw
from .test_webhook import one, sink_to, until, web
from .test_webhook_large import content_of, large

__all__ = ["web"]
NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)
Make = Callable[..., ssl.SSLContext]


# Python 3.13 asks for what RFC 5280 asks for: key usage, and key identifiers.
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
    key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
)  # fmt: skip


class Authority:
    """A certificate authority that the sink trusts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        made = self._begin(self.name, self.key.public_key(), NOW + DAY)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        made = made.add_extension(_SIGNS_CERTIFICATES, critical=True)
        made = made.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
        )
        self.file = folder / "authority.pem"
        self.file.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _begin(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, until: dt.datetime, issuer: x509.Name | None = None) -> x509.CertificateBuilder:  # fmt: skip
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 10 * DAY)
            .not_valid_after(until)
        )

    def server(self, *, host: str = "127.0.0.1", until: dt.datetime = NOW + DAY, own: bool = False) -> ssl.SSLContext:  # fmt: skip
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver")])
        alternative: x509.GeneralName
        try:
            alternative = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        made = self._begin(name, key.public_key(), until, issuer=name if own else self.name)
        made = made.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        signer = key if own else self.key
        made = made.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        signed = made.sign(signer, hashes.SHA256())
        file = self.folder / "server.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + signed.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(file)
        return context


@early
async def speaks_no_tls(x: Exchange) -> None:
    await x.reader.read(1)
    await x.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await x.close()


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.file))
    return made


async def test_a_good_certificate_is_accepted_and_the_connection_kept(
    authority: Authority, tmp_path: Path
) -> None:
    before = len(open_descriptors())
    async with Receiver(authority.server()) as web:
        async with sink_to(web.url) as sink:
            for number in (1, 2):
                assert await one(sink, number) == Delivered()
            assert web.connections == 1
            content = b"x\xff" * 1_000_000
            assert await sink.deliver([large(tmp_path, content)]) == [Delivered()]
            assert content_of(web.seen[-1].body) == content
            web.does = closes_the_next()
            assert await one(sink, 3) == Delivered()
            web.does = good
            assert await one(sink, 4) == Delivered()
            web.does = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "close")
            assert isinstance(await one(sink, 5), Deferred)
        await until(lambda: not web._writers)
    assert set(web.taken) == {*ids(some(5)), web.seen[2].id}
    await until(lambda: len(open_descriptors()) <= before)


async def test_a_name_is_looked_up_and_its_certificate_compared_with_it(authority: Authority) -> None:
    async with (
        Receiver(authority.server(host="localhost")) as web,
        sink_to(f"https://localhost:{web.port}/hook") as sink,
    ):
        assert await one(sink) == Delivered()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until": NOW - DAY}, "certificate has expired"),
        ({"own": True}, "self-signed certificate"),
        ({"host": "127.0.0.2"}, "not valid for '127.0.0.1'"),
        ({"host": "elsewhere.example"}, "not valid for '127.0.0.1'"),
    ],
)  # fmt: skip
async def test_a_certificate_that_does_not_hold_is_refused_and_named(
    authority: Authority, options: dict[str, object], said: str
) -> None:
    async with Receiver(authority.server(**options)) as web, sink_to(web.url) as sink:  # type: ignore[arg-type]
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.connection
        assert outcome.reason.startswith(f"127.0.0.1:{web.port}: its certificate is not accepted: ")
        assert said in outcome.reason
        assert web.seen == []


async def test_a_certificate_of_nobody_we_trust_is_refused(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = authority.server()
    monkeypatch.delenv("SSL_CERT_FILE")
    async with Receiver(tls) as web, sink_to(web.url) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.connection
        assert "its certificate is not accepted: unable to get local issuer certificate" in outcome.reason
        assert web.seen == []


async def test_tls_where_nobody_speaks_it_and_the_other_way_round(
    web: Receiver, authority: Authority
) -> None:
    web.does = speaks_no_tls
    async with sink_to(web.url.replace("http:", "https:")) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.connection
    async with Receiver(authority.server()) as other, sink_to(other.url.replace("https:", "http:")) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert other.seen == []


async def test_a_receiver_that_speaks_first_is_left_at_once(authority: Authority) -> None:
    """SMTPS, say. With TLS 1.2 its banner may come with the end of the handshake, before a word of ours."""

    @early
    async def banner(x: Exchange) -> None:
        await x.say(b"220 mail ESMTP ready\r\n")
        await x.until_gone()

    tls = authority.server()
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    async with Receiver(tls) as web, sink_to(web.url, timeout=Duration(5)) as sink:
        web.does = banner
        began = time.monotonic()
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert "no HTTP" in outcome.reason
        assert time.monotonic() - began < 4
        assert web.connections == 1


async def test_a_receiver_that_is_silent_in_its_handshake_is_left(
    web: Receiver, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentqd.sinks import httppost

    from .httpreceiver import never_reads

    monkeypatch.setattr(httppost, "CONNECT_S", 0.3)
    web.does = never_reads
    async with sink_to(web.url.replace("http:", "https:")) as sink:
        outcome = await one(sink)
        assert isinstance(outcome, Deferred)
        assert outcome.connection
        assert "no connection within 0.3 s" in outcome.reason
