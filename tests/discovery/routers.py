"""What honest routers say, as captured in form and with addresses of documentation."""

from __future__ import annotations

GATEWAY = "192.168.7.1"
OURS = "192.168.7.20"
OUTSIDE = "11.22.33.44"
WAN_IP = "urn:schemas-upnp-org:service:WANIPConnection:1"
ROOT = "root"  # the element that UPnP wants around all
IGD = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"


def ssdp_answer(location: str = f"http://{GATEWAY}:5000/desc.xml", target: str = IGD) -> bytes:
    return (
        "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n"
        f"ST: {target}\r\nUSN: uuid:4f1c::{target}\r\nEXT:\r\nSERVER: Router/1.0 UPnP/1.1\r\n"
        f"LOCATION: {location}\r\n\r\n"
    ).encode()


def description(
    control_url: str = "/ctl/IPConn", *, base: str = "", service: str = WAN_IP
) -> bytes:
    url_base = f"<URLBase>{base}</URLBase>" if base else ""
    return (
        f'<?xml version="1.0"?>\r\n<{ROOT} xmlns="urn:schemas-upnp-org:device-1-0">'
        f"{url_base}<specVersion><major>1</major><minor>0</minor></specVersion><device>"
        f"<deviceType>{IGD}</deviceType><friendlyName>Router &amp; more</friendlyName>"
        "<serviceList><service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1"
        "</serviceType><controlURL>/ctl/L3F</controlURL></service></serviceList>"
        "<deviceList><device><deviceList><device><serviceList><service>"
        f"<serviceType>{service}</serviceType><SCPDURL>/WANIPCn.xml</SCPDURL>"
        f"<controlURL>{control_url}</controlURL><eventSubURL>/evt</eventSubURL></service>"
        "</serviceList></device></deviceList></device></deviceList></device>"
        f"</{ROOT}>"
    ).encode()


def soap_answer(action: str, **values: object) -> bytes:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in values.items())
    return _envelope(f'<u:{action}Response xmlns:u="{WAN_IP}">{inner}</u:{action}Response>')


def soap_fault(code: object, text: str = "ConflictInMappingEntry") -> bytes:
    return _envelope(
        "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>"
        f'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{code}</errorCode>'
        f"<errorDescription>{text}</errorDescription></UPnPError></detail></s:Fault>"
    )


def _envelope(body: str) -> bytes:
    return (
        '<?xml version="1.0"?>\r\n<s:Envelope '
        'xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        f"{body}</s:Body></s:Envelope>\r\n"
    ).encode()


def http_answer(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
