//! Whether there is a connection, as far as fred has reported it: decides which calls were surely never sent.

use fred::clients::Client;
use fred::interfaces::EventInterface;
use fred::types::config::Server;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::Instant;

use super::super::Sent;

/// The connections that were made and that broke, as fred reports them: in two channels without an order between them.
pub(super) struct Events {
    /// Each connection that was made, before anything is written on it.
    connections: Receiver<Server>,
    /// Each connection that could not be made, or broke, after which nothing is written on it.
    failures: Receiver<(fred::error::Error, Option<Server>)>,
    pub(super) last: Option<(fred::error::Error, Option<Server>)>,
    /// How many connections were made.
    made: u64,
    /// The last connection broke, and none has been made since. Meaningless for a client with several at a time.
    pub(super) is_broken: bool,
}

impl Events {
    pub(super) fn of(client: &Client, is_broken: bool) -> Self {
        Self { connections: client.reconnect_rx(), failures: client.error_rx(), last: None, made: 0, is_broken }
    }

    /// Reads both channels. Returns whether `is_broken` has changed.
    ///
    /// The channel of connections is read first. So a failure that is read now may be older than a connection that is
    /// read now, which then counts; but no failure that is read later is older than a connection that is read now.
    pub(super) fn take_in(&mut self) -> bool {
        if self.connections.is_empty() && self.failures.is_empty() {
            return false;
        }
        let (before, was_broken) = (self.made, self.is_broken);
        loop {
            match self.connections.try_recv() {
                Ok(_) => self.made += 1,
                Err(TryRecvError::Lagged(missed)) => self.made += missed,
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
        }
        let mut has_failed = false;
        loop {
            match self.failures.try_recv() {
                Ok(failure) => self.last = Some(failure),
                Err(TryRecvError::Lagged(_)) => {}
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            }
            has_failed = true;
        }
        // In doubt, assume a connection, so that a call may have been sent.
        self.is_broken = self.made == before && (was_broken || has_failed);
        self.is_broken != was_broken
    }

    /// Returns how many connections were made.
    pub(super) fn made(&self) -> u64 {
        self.made
    }

    /// Returns the state for a call that is sent now.
    pub(super) fn sent(&self, at: Instant) -> Sent {
        Sent { at, made: self.made, without: self.is_broken }
    }

    /// Returns whether there was no connection when the call began, and none has been made since.
    pub(super) fn never_sent(&self, sent: Sent) -> bool {
        sent.without && sent.made == self.made
    }
}

#[cfg(test)]
mod tests {
    use fred::error::ErrorKind;
    use tokio::sync::broadcast;

    use super::*;

    /// What fred reports, as the test has it.
    struct Told {
        connections: broadcast::Sender<Server>,
        failures: broadcast::Sender<(fred::error::Error, Option<Server>)>,
        events: Events,
    }

    impl Told {
        fn new(is_broken: bool) -> Self {
            let (connections, failures) = (broadcast::channel(4).0, broadcast::channel(4).0);
            let receivers = (connections.subscribe(), failures.subscribe());
            let events = Events { connections: receivers.0, failures: receivers.1, last: None, made: 0, is_broken };
            Self { connections, failures, events }
        }

        fn connects(&self) {
            self.connections.send(Server::new("a", 1)).unwrap();
        }

        fn breaks(&self) {
            let broken = fred::error::Error::new(ErrorKind::IO, "Connection closed.");
            self.failures.send((broken, Some(Server::new("a", 1)))).unwrap();
        }

        fn begin(&mut self) -> Sent {
            self.events.take_in();
            self.events.sent(Instant::now())
        }

        fn never_sent(&mut self, sent: Sent) -> bool {
            self.events.take_in();
            self.events.never_sent(sent)
        }
    }

    #[test]
    fn what_began_without_a_connection_and_ended_without_one_was_never_sent() {
        let mut told = Told::new(false);
        told.breaks();
        let sent = told.begin();
        assert!(told.never_sent(sent));
        // However often it is tried in vain.
        told.breaks();
        assert!(told.never_sent(sent));
        let later = told.begin();
        told.connects();
        assert!(!told.never_sent(sent) && !told.never_sent(later));
    }

    #[test]
    fn before_the_first_connection_nothing_was_sent() {
        let mut told = Told::new(true);
        let sent = told.begin();
        assert!(told.never_sent(sent));
        told.connects();
        assert!(!told.never_sent(sent));
        let sent = told.begin();
        assert!(!told.never_sent(sent));
    }

    #[test]
    fn in_doubt_a_call_was_sent() {
        // A connection may have been made before the failure or after it.
        for connects_first in [true, false] {
            let mut told = Told::new(false);
            match connects_first {
                true => (told.connects(), told.breaks()),
                false => (told.breaks(), told.connects()),
            };
            let sent = told.begin();
            assert!(!told.never_sent(sent), "{connects_first}");
        }
        // It breaks while the call is under way.
        let mut told = Told::new(false);
        let sent = told.begin();
        told.breaks();
        assert!(!told.never_sent(sent));
        // It comes, and is gone again before its end.
        let mut told = Told::new(false);
        told.breaks();
        let sent = told.begin();
        told.connects();
        told.breaks();
        assert!(!told.never_sent(sent));
        // So much has happened that not all is known.
        for _ in 0..9 {
            told.breaks();
        }
        let sent = told.begin();
        for _ in 0..9 {
            told.connects();
            told.breaks();
        }
        assert!(!told.never_sent(sent));
    }
}
