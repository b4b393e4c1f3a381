import threading
from http.client import HTTPConnection
from urllib.parse import urlsplit

from tests.helpers.hub_server import HubServer


def test_no_thread_of_the_server_outlives_it_though_a_client_keeps_its_connection():
    before = set(threading.enumerate())
    with HubServer({}) as server:
        client = HTTPConnection(urlsplit(server.url).netloc)
        client.request("GET", "/nothing")
        assert client.getresponse().read()
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before
    client.close()
