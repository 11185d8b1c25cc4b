//! Ports that belong to one server for as long as the test has it, also while it is down.

use std::net::{TcpListener, UdpSocket};
use std::ops::Range;

/// Below the ports that the system gives to connections (on Linux from 32,768 on). There, a client that keeps trying to
/// reach a server which is down is at some point given the server's own port, and is connected to itself. Or the
/// connection of another has the port that the server needs to come back.
const PORTS: Range<u16> = 10_000..20_000;

/// How far the port of its bus is above that of a cluster's node. Before Redis 7 there is no other choice.
pub(crate) const BUS: u16 = 10_000;

/// A port of the loopback interface.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    /// The UDP port of that number, which nobody uses. Whoever has it, in this process or another, has the port.
    _mark: UdpSocket,
}

impl Port {
    /// Finds a port that is free, and so is that for the bus.
    pub(crate) fn find() -> Self {
        (0..1_000).find_map(|_| Self::take(fastrand::u16(PORTS))).expect("a free port")
    }

    fn take(number: u16) -> Option<Self> {
        let mark = UdpSocket::bind(("127.0.0.1", number)).ok()?;
        let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
        (is_free(number) && is_free(number + BUS)).then_some(Self { number, _mark: mark })
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}
