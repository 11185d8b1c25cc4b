//! How a node says that another one decides about a key.

use super::super::url::Address;
use crate::Error;

/// Which node to send a command to instead.
#[derive(Debug, PartialEq)]
pub(in super::super) enum Elsewhere {
    Moved(Address),
    Ask(Address),
}

/// Reads a redirection out of the error with which the server `here` replied.
pub(in super::super) fn elsewhere(error: &Error, here: &Address) -> Option<Elsewhere> {
    let Error::Redis(error) = error else { return None };
    let mut words = error.details().split_ascii_whitespace();
    let redirection = match words.next()? {
        "MOVED" => Elsewhere::Moved,
        "ASK" => Elsewhere::Ask,
        _ => return None,
    };
    let (host, port) = words.nth(1)?.rsplit_once(':')?;
    let port = port.parse().ok()?;
    match host {
        // The address is unknown to that node.
        "?" => None,
        // The same host as that node's.
        "" => Some(redirection(Address { port, ..here.clone() })),
        host => Some(redirection(Address::new(host, port))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RedisError, RedisErrorKind};

    fn told(details: &'static str) -> Option<Elsewhere> {
        let error = RedisError::new(RedisErrorKind::Cluster, details).into();
        elsewhere(&error, &Address::new("here", 7000))
    }

    #[test]
    fn a_redirection_is_read_as_the_server_writes_it() {
        assert_eq!(told("MOVED 3999 10.0.0.1:6381"), Some(Elsewhere::Moved(Address::new("10.0.0.1", 6381))));
        assert_eq!(
            told("ASK 3999 redis-1.internal:6381"),
            Some(Elsewhere::Ask(Address::new("redis-1.internal", 6381)))
        );
        assert_eq!(told("ASK 3999 2001:db8::1:6381"), Some(Elsewhere::Ask(Address::new("2001:db8::1", 6381))));
        assert_eq!(told("MOVED 3999 :6381"), Some(Elsewhere::Moved(Address::new("here", 6381))));
        for nothing in
            ["MOVED 3999 ?:6381", "MOVED", "ASK 3999", "ASK 3999 a:b", "TRYAGAIN Multiple keys", "MOVEDX 1 a:1"]
        {
            assert_eq!(told(nothing), None, "{nothing}");
        }
    }
}
