//! How a node says that another one decides about a key.

use fred::types::config::Server;

use crate::Error;

/// Which node to send a command to instead.
#[derive(Debug, PartialEq)]
pub(super) enum Elsewhere {
    Moved(Server),
    Ask(Server),
}

/// Reads a redirection out of the error with which the server `here` replied.
pub(super) fn elsewhere(error: &Error, here: &Server) -> Option<Elsewhere> {
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
        "" => Some(redirection(Server { port, ..here.clone() })),
        host => Some(redirection(Server::new(host, port))),
    }
}

#[cfg(test)]
mod tests {
    use fred::error::ErrorKind;

    use super::*;

    fn told(details: &'static str) -> Option<Elsewhere> {
        let error = fred::error::Error::new(ErrorKind::Cluster, details).into();
        elsewhere(&error, &Server::new("here", 7000))
    }

    #[test]
    fn a_redirection_is_read_as_the_server_writes_it() {
        assert_eq!(told("MOVED 3999 10.0.0.1:6381"), Some(Elsewhere::Moved(Server::new("10.0.0.1", 6381))));
        assert_eq!(told("ASK 3999 redis-1.internal:6381"), Some(Elsewhere::Ask(Server::new("redis-1.internal", 6381))));
        assert_eq!(told("ASK 3999 2001:db8::1:6381"), Some(Elsewhere::Ask(Server::new("2001:db8::1", 6381))));
        assert_eq!(told("MOVED 3999 :6381"), Some(Elsewhere::Moved(Server::new("here", 6381))));
        for nothing in
            ["MOVED 3999 ?:6381", "MOVED", "ASK 3999", "ASK 3999 a:b", "TRYAGAIN Multiple keys", "MOVEDX 1 a:1"]
        {
            assert_eq!(told(nothing), None, "{nothing}");
        }
    }
}
