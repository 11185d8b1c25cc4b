//! Detects connections that are dead although nobody has closed them.

use std::time::Duration;

use tokio::time::Instant;

use super::Sent;

/// The shortest silence that counts: a server that is far away may take so long to reply.
const SHORTEST_SILENCE: Duration = Duration::from_millis(150);

/// How much longer than a silence a new connection may take until it is requested again: the request may have been
/// lost. While the server is away, a client may keep all requests, and open one connection for each when it is back.
const REQUESTED_AGAIN: u32 = 16;

/// Whether the server still replies. A connection that was silently cut (by a firewall that forgot it, or a peer that
/// vanished) looks like any other until the system gives up on it, which takes minutes.
#[derive(Default)]
pub(in super::super) struct Liveness {
    /// How long the server may send nothing while calls wait for a reply.
    pub(super) patience: Duration,
    /// When the server last replied, or a new connection was requested.
    heard: Option<Instant>,
    /// When the first call was sent of those that have had no reply since.
    unanswered: Option<Instant>,
    /// How many connections had been made when this was last asked.
    made: u64,
    /// Until when the server may be in a `WAIT` of ours on this connection, the last one of so many that were made: it
    /// replies to nothing behind that.
    blocked: Option<(u64, Instant)>,
    /// The last connection that was found dead, as the last of so many that were made, and when.
    dead: Option<(u64, Instant)>,
}

impl Liveness {
    pub(in super::super) fn with_patience(patience: Duration) -> Self {
        Self { patience, ..Self::default() }
    }

    pub(in super::super) fn heard(&mut self) {
        self.heard = Some(Instant::now());
        self.unanswered = None;
    }

    /// Notes that the server is about to be sent what may block the connection, the last one of so many, until then.
    pub(super) fn blocks(&mut self, until: Instant, made: u64) {
        let before = self.blocked.filter(|(of, _)| *of == made);
        self.blocked = Some((made, before.map_or(until, |(_, before)| before.max(until))));
    }

    /// Notes the reply to what might have blocked the connection until then.
    pub(super) fn no_longer_blocks(&mut self, until: Instant) {
        // Replies come in order. Behind this one, another may still block.
        self.blocked.take_if(|(_, last)| *last <= until);
    }

    /// Returns whether the connection is dead, as this call has had no reply. Returns true once for each connection,
    /// and again if no other one was made for very long: opening one after the other while all are slow would make
    /// nothing faster.
    ///
    /// A call that began before the connection was made, the last one of so many, says nothing about it: it may have
    /// been sent a moment ago. Closing it would fail all other calls on a connection as good as new.
    pub(in super::super) fn is_silent(&mut self, sent: Sent, made: u64) -> bool {
        if self.made != made {
            self.made = made;
            self.unanswered = None;
        }
        let (began_before, sent) = (sent.made != made, sent.at);
        // Other calls have had replies meanwhile: the server is slow, not dead.
        if began_before || self.heard.is_some_and(|heard| heard >= sent) {
            return false;
        }
        let mut since = *self.unanswered.get_or_insert(sent);
        if let Some((_, until)) = self.blocked.filter(|(of, _)| *of == made) {
            since = since.max(until);
        }
        // A call that has less time than others needs a reply sooner, or a lock with a short ttl is lost.
        let waited = sent.elapsed();
        let patience = if waited * 2 < self.patience { waited.max(SHORTEST_SILENCE) } else { self.patience };
        let silent = since.elapsed() >= patience;
        if silent {
            self.heard();
        }
        // Whether a connection that was requested before is not there yet.
        let reconnect_is_pending =
            |(of, at): (u64, Instant)| of == made && at.elapsed() < self.patience.saturating_mul(REQUESTED_AGAIN);
        let is_first_report = silent && !self.dead.is_some_and(reconnect_is_pending);
        if is_first_report {
            self.dead = Some((made, Instant::now()));
        }
        is_first_report
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A call on the first connection that begins now.
    fn sent() -> Sent {
        Sent { made: 1, ..Sent::with_connection(Instant::now()) }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_dead_when_nothing_was_heard_for_long_while_something_was_asked() {
        let mut liveness = Liveness { patience: ms(400), ..Liveness::default() };
        liveness.heard();
        // However long nothing was asked.
        advance(ms(60_000)).await;
        let first = sent();
        advance(ms(200)).await;
        assert!(!liveness.is_silent(first, 1));
        let second = sent();
        advance(ms(200)).await;
        assert!(liveness.is_silent(second, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_has_little_time_finds_a_connection_dead_sooner() {
        let mut liveness = Liveness { patience: ms(4_000), ..Liveness::default() };
        liveness.heard();
        advance(ms(1_000)).await;
        let first = sent();
        advance(ms(30)).await;
        assert!(!liveness.is_silent(first, 1), "it may be far away");
        let second = sent();
        advance(ms(300)).await;
        assert!(liveness.is_silent(second, 1));
        assert!(!liveness.is_silent(second, 1), "once for each connection");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_server_is_not_a_dead_connection() {
        let mut liveness = Liveness { patience: ms(400), ..Liveness::default() };
        for _ in 0..10 {
            let sent = sent();
            advance(ms(100)).await;
            liveness.heard();
            advance(ms(400)).await;
            assert!(!liveness.is_silent(sent, 1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_calls_on_a_dead_connection_one_opens_a_new_one() {
        let mut liveness = Liveness { patience: ms(400), ..Liveness::default() };
        let sent = sent();
        advance(ms(400)).await;
        let opened = (0..1_000).filter(|_| liveness.is_silent(sent, 1)).count();
        assert_eq!(opened, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_is_not_dead_by_what_was_sent_before() {
        let mut liveness = Liveness { patience: ms(400), ..Liveness::default() };
        let first = sent();
        advance(ms(300)).await;
        assert!(!liveness.is_silent(first, 1));
        advance(ms(300)).await;
        assert!(!liveness.is_silent(first, 2));
        let second = Sent { made: 2, ..sent() };
        advance(ms(300)).await;
        assert!(!liveness.is_silent(second, 2), "the silence of the first does not count");
        advance(ms(100)).await;
        assert!(liveness.is_silent(second, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn one_silence_opens_one_connection_however_long_that_takes() {
        let mut liveness = Liveness { patience: ms(2_000), ..Liveness::default() };
        let mut opened = Vec::new();
        let began = Instant::now();
        // All calls fail until the requested connection is there.
        for _ in 0..20 {
            let sent = sent();
            advance(ms(200)).await;
            if liveness.is_silent(sent, 1) {
                opened.push(began.elapsed());
            }
            // Those that were in flight on the old connection.
            liveness.heard();
            advance(ms(10)).await;
        }
        assert_eq!(opened, [ms(200)]);
        // The next one is silent, too.
        let sent = Sent { made: 2, ..sent() };
        advance(ms(200)).await;
        assert!(liveness.is_silent(sent, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_never_came_is_requested_again() {
        let mut liveness = Liveness { patience: ms(2_000), ..Liveness::default() };
        let mut opened = Vec::new();
        let began = Instant::now();
        for _ in 0..400 {
            let sent = sent();
            advance(ms(200)).await;
            if liveness.is_silent(sent, 1) {
                opened.push(began.elapsed());
            }
        }
        assert_eq!(opened, [1, 161, 321].map(|n| ms(200 * n)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_behind_a_wait_of_ours_is_not_behind_a_dead_connection() {
        let mut liveness = Liveness { patience: ms(4_000), ..Liveness::default() };
        let waits_until = Instant::now() + ms(1_600);
        liveness.blocks(waits_until, 1);
        for _ in 0..5 {
            let behind = sent();
            advance(ms(300)).await;
            assert!(!liveness.is_silent(behind, 1));
        }
        // A reply to what came before it changes nothing.
        liveness.heard();
        advance(ms(1)).await;
        let behind = sent();
        advance(ms(300)).await;
        assert!(!liveness.is_silent(behind, 1), "201 ms after its end");
        let next = sent();
        advance(ms(300)).await;
        assert!(liveness.is_silent(next, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_blocks_until_its_reply_and_only_its_own_connection() {
        let mut liveness = Liveness { patience: ms(4_000), ..Liveness::default() };
        let [first, last] = [1_600, 1_700].map(|n| Instant::now() + ms(n));
        // The later one, whichever is noted last.
        liveness.blocks(last, 1);
        liveness.blocks(first, 1);
        liveness.no_longer_blocks(first);
        let behind = sent();
        advance(ms(300)).await;
        assert!(!liveness.is_silent(behind, 1));
        liveness.no_longer_blocks(last);
        liveness.heard();
        advance(ms(1)).await;
        let after = sent();
        advance(ms(300)).await;
        assert!(liveness.is_silent(after, 1));
        liveness.blocks(Instant::now() + ms(1_600), 1);
        advance(ms(1)).await;
        let next = Sent { made: 2, ..sent() };
        advance(ms(300)).await;
        assert!(liveness.is_silent(next, 2));
    }
}
