"""Keys go to this machine and to the hosts that the operator names."""

import pytest

from hass_core.trusted_hosts import is_trusted


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:8000/v1", "http://localhost/v1", "https://[::1]:8/", "http://127.8.8.8/"),
        *("HTTP://LOCALHOST./v1", "http://[0:0:0:0:0:0:0:1]/", "http://me@localhost:/"),
    ],
)
def test_this_machine_is_trusted(url, monkeypatch):
    monkeypatch.delenv("HASS_TRUSTED_HOSTS", raising=False)
    assert is_trusted(url)


ELSEWHERE = [
    *(
        "http://10.0.0.7:8000/v1",
        "https://api.example.org/v1",
        "http://localhost.example.org/",
        "http://127.0.0.1.nip.io/",
    ),
    *("http://evil.example\\@localhost/", "http://localhost\\@evil.example/", "http://a@evil.example@localhost/"),
    *("http://local\thost/", "http://localhost\n/", "http://127.0.0.1 /", "http://127.1/", "http://2130706433/"),
    *("http://localhost%2eevil.example/", "http://[::ffff:10.0.0.7]/", "http://localhost:x/", "//", "http://@/"),
    *("", "sqlite:///runs.db", "http://127.0.0.1@evil.example/", "http://[::1", "https://evil.example#localhost"),
]


@pytest.mark.parametrize("url", ELSEWHERE)
def test_any_other_host_is_not(url, monkeypatch):
    monkeypatch.delenv("HASS_TRUSTED_HOSTS", raising=False)
    assert not is_trusted(url)


NAMED = {
    "api.example.org": ["https://api.example.org/v1", "https://API.example.org:8443/v1", "https://api.example.org./"],
    " a.org , *.example.org": ["http://a.org", "http://deep.api.example.org"],
    "a.org:8000": ["http://a.org:8000/v1"],
    "A.org.:443": ["https://a.org/v1", "https://a.org:443"],
    "2001:db8::1, [2001:db8::2]:8000": ["http://[2001:DB8:0::1]:9/", "http://[2001:db8::2]:8000/v1"],
}


@pytest.mark.parametrize("hosts", NAMED)
def test_named_hosts_are(hosts, monkeypatch):
    monkeypatch.setenv("HASS_TRUSTED_HOSTS", hosts)
    assert all(map(is_trusted, NAMED[hosts]))
    assert not any(map(is_trusted, ["http://b.org", "http://example.org.evil.net", "http://b.a.org"]))


@pytest.mark.parametrize("hosts", ["", ",", " , ", "[abc]", "http://a.org", "a.org:x", "["])
def test_an_entry_that_names_no_host_trusts_none(hosts, monkeypatch):
    monkeypatch.setenv("HASS_TRUSTED_HOSTS", hosts)
    assert not any(map(is_trusted, ["http://a/", "http://a.org/", "http://http/", "http:///", "http://[::2]/"]))


def test_a_port_can_be_part_of_the_name(monkeypatch):
    monkeypatch.setenv("HASS_TRUSTED_HOSTS", "a.org:8000")
    assert not is_trusted("http://a.org:9000")
    assert not is_trusted("http://a.org/")
