//! Where `audit export --to` sends entries: one datagram each, as syslog (RFC 5424 over a local socket, or RFC 5426) and the journal's
//! own protocol have it.

use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;

use crate::telemetry::{ErrorClass, Problem};

/// A socket that takes entries.
pub(super) struct Collector {
    name: String,
    socket: Socket,
}

enum Socket {
    Local(UnixDatagram),
    Udp(UdpSocket),
}

impl Collector {
    /// Connects to `udp:ADDRESS:PORT`, or to the socket of this path.
    pub(super) fn open(name: &str) -> Result<Self, Problem> {
        let socket = match name.strip_prefix("udp:") {
            Some(address) => UdpSocket::bind("[::]:0").or_else(|_| UdpSocket::bind("0.0.0.0:0")).and_then(|socket| {
                socket.connect(address)?;
                Ok(Socket::Udp(socket))
            }),
            None => UnixDatagram::unbound().and_then(|socket| {
                socket.connect(name)?;
                Ok(Socket::Local(socket))
            }),
        };
        let refuse = |error: std::io::Error| {
            let problem = Problem::new(ErrorClass::Misuse, format!("cannot send to `{name}`: {error}")).with_code("audit");
            problem.with_hint("expected the path of a datagram socket, e.g. `/dev/log`, or `udp:ADDRESS:PORT`")
        };
        Ok(Self { name: name.to_owned(), socket: socket.map_err(refuse)? })
    }

    /// One entry. A local socket that is full is waited for; over UDP nobody says whether it arrived.
    pub(super) fn send(&self, entry: &str) -> Result<(), Problem> {
        let text = datagram(entry);
        let sent = match &self.socket {
            Socket::Local(socket) => socket.send(text.as_bytes()),
            Socket::Udp(socket) => socket.send(text.as_bytes()),
        };
        sent.map(drop).map_err(|error| {
            let why = format!("cannot send an entry of {} bytes to `{}`: {error}", text.len(), self.name);
            Problem::new(ErrorClass::Local, why).with_code("audit").with_hint("those before it were sent; `--since` goes on from a time")
        })
    }
}

/// A datagram needs no end of a line, and the journal takes no field that begins with `_`: those it sets itself.
fn datagram(entry: &str) -> String {
    let lines: Vec<&str> = entry.trim_end_matches('\n').split('\n').filter(|line| !line.starts_with('_')).collect();
    // The journal wants an end behind each field.
    if lines.len() > 1 { lines.join("\n") + "\n" } else { lines.concat() }
}
