//! Notifications that a key may have become free, and the subscriptions of the waiters to them.
//!
//! 1. A key is in the registry as long as somebody is subscribed to it: the last subscription that is dropped removes
//!    it.
//! 2. Waiters keep the [`Feed`] of their notifications running: before they wait, and every [`CHECK_EVERY`] while they
//!    do, they ask each feed to start again if it has ended or stands still. So a channel that is not open opens again
//!    while anybody waits, and all waiters are notified when it does.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use tokio::select;
use tokio::sync::watch;
use tokio::time::sleep;

use super::node::Refusal;

/// How often a waiter makes sure that notifications can reach it.
pub(crate) const CHECK_EVERY: Duration = Duration::from_millis(250);

/// A subscription to the notifications of one key, from one source or several.
pub(crate) struct Subscription(Vec<Source>);

struct Source {
    /// Notifications from here don't end a wait.
    is_ignored: bool,
    state: watch::Receiver<State>,
    /// `None` for notifications from within this process.
    feed: Option<Arc<dyn Feed>>,
    /// Dropped after the receiver, so that the receiver is no longer counted then.
    _entry: Entry,
}

/// What a subscriber sees of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// How many notifications there were: a subscriber that has seen a number misses nothing that comes after it.
    count: u64,
    channel: ChannelState,
}

/// Whether notifications arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ChannelState {
    /// Not yet, or not for the moment.
    #[default]
    Opening,
    Open,
    /// The server doesn't provide them for now.
    Refused,
}

/// Receives the notifications from a server, in a task that may end or stand still.
pub(crate) trait Feed: Send + Sync {
    /// Starts the task again, on a runtime that runs, if it has ended or stands still. Waiters call this from within a
    /// runtime; it is cheap and does not block.
    fn keep_running(self: Arc<Self>);
}

impl Subscription {
    /// Subscribes to the notifications of all of them.
    pub(crate) fn join(parts: impl IntoIterator<Item = Self>) -> Self {
        Self(parts.into_iter().flat_map(|part| part.0).collect())
    }

    /// Returns the subscription with the feed that its notifications come from.
    pub(crate) fn fed_by(mut self, feed: &Arc<impl Feed + 'static>) -> Self {
        for source in &mut self.0 {
            source.feed = Some(feed.clone());
        }
        self
    }

    /// Ignores notifications from some of the sources, and no others, from now on: if all that refused are open.
    pub(crate) fn heed(&mut self, refusal: Refusal) {
        let is_open = |source: &Source| source.state.borrow().channel == ChannelState::Open;
        let mut refused = self.0.iter().enumerate().filter(|(place, _)| refusal.by.contains(*place));
        let are_open = refused.all(|(_, source)| is_open(source));
        for (place, source) in self.0.iter_mut().enumerate() {
            source.is_ignored = are_open && refusal.ignored.contains(place);
        }
    }

    /// Marks all notifications up to now as seen.
    pub(crate) fn mark(&mut self) {
        for source in &mut self.0 {
            source.state.mark_unchanged();
        }
    }

    /// Returns whether no notification is missed from now on. Of several sources, most must be open.
    pub(crate) fn is_open(&self) -> bool {
        let open = self.0.iter().filter(|source| source.state.borrow().channel == ChannelState::Open).count();
        open > self.0.len() / 2
    }

    /// Waits until the channel is open, or refused.
    pub(crate) async fn opened(&mut self) {
        loop {
            // A channel that was refused because no feed was running is opening afterwards.
            self.keep_running();
            // Marked before the check, so that a change after the check ends the wait.
            self.mark();
            if self.is_open() || self.0.iter().all(|source| source.state.borrow().channel != ChannelState::Opening) {
                return;
            }
            self.notified().await;
        }
    }

    /// Waits for a notification since the last [`mark`](Subscription::mark), or since the last one that this has
    /// returned for. Keeps the feeds running meanwhile (invariant 2).
    pub(crate) async fn notified(&mut self) {
        loop {
            let has_feed = self.keep_running();
            select! {
                // A notification that is there ends the wait, even if the feeds are due for a check.
                biased;
                () = self.changed() => return,
                () = async { sleep(CHECK_EVERY).await }, if has_feed => {}
            }
        }
    }

    /// Returns whether there is a feed to keep running.
    fn keep_running(&self) -> bool {
        let feeds = self.0.iter().filter_map(|source| source.feed.clone());
        feeds.map(Feed::keep_running).count() > 0
    }

    async fn changed(&mut self) {
        let heeded = self.0.iter_mut().filter(|source| !source.is_ignored);
        let mut sources: Vec<_> = heeded.map(|source| Box::pin(source.state.changed())).collect();
        poll_fn(|context| {
            let mut has_changed = false;
            sources.retain_mut(|state| match state.as_mut().poll(context) {
                Poll::Ready(Ok(())) => {
                    has_changed = true;
                    false
                }
                // Nothing more comes from a source that has gone.
                Poll::Ready(Err(_)) => false,
                Poll::Pending => true,
            });
            if has_changed { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Returns a subscription to the same notifications, each delayed by so much. The future passes them on until that
    /// subscription is dropped.
    #[cfg(test)]
    pub(crate) fn later(mut self, delay: Duration) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let sender = watch::Sender::new(State { count: 0, channel: ChannelState::Open });
        let entry = Entry { senders: Arc::default(), key: Bytes::new() };
        let subscription =
            Self(vec![Source { is_ignored: false, state: sender.subscribe(), feed: None, _entry: entry }]);
        let carry = async move {
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    () = self.notified() => {}
                }
                sleep(delay).await;
                sender.send_modify(|state| state.count += 1);
            }
        };
        (subscription, carry)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states: Vec<State> = self.0.iter().map(|source| *source.state.borrow()).collect();
        f.debug_tuple("Subscription").field(&states).finish()
    }
}

/// The keys that somebody is subscribed to, and how to notify the subscribers.
pub(crate) struct Subscriptions(Arc<Mutex<Senders>>);

type Senders = HashMap<Bytes, watch::Sender<State>>;

/// Removes the key from the registry with its last subscription (invariant 1).
struct Entry {
    senders: Arc<Mutex<Senders>>,
    key: Bytes,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let removed = {
            let mut senders = lock(&self.senders);
            // Another subscription may have removed the key, and yet another may have added it again. Whichever finds
            // no receiver removes it.
            let is_unused = senders.get(&self.key).is_some_and(|sender| sender.receiver_count() == 0);
            is_unused.then(|| senders.remove(&self.key))
        };
        drop(removed);
    }
}

impl Subscriptions {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// Subscribes to a key. Returns also whether it is the only subscription; the channel is as given then.
    pub(crate) fn subscribe(&self, key: Bytes, channel: ChannelState) -> (Subscription, bool) {
        let mut senders = self.senders();
        let mut is_first = false;
        let sender = senders.entry(key.clone()).or_insert_with(|| {
            is_first = true;
            watch::Sender::new(State { count: 0, channel })
        });
        let state = sender.subscribe();
        drop(senders);
        let _entry = Entry { senders: self.0.clone(), key };
        (Subscription(vec![Source { is_ignored: false, state, feed: None, _entry }]), is_first)
    }

    /// Notifies the subscribers of the key.
    pub(crate) fn notify(&self, key: &[u8]) {
        // Wakers of tasks only schedule them: no foreign code runs under the mutex.
        if let Some(sender) = self.senders().get(key) {
            sender.send_modify(|state| state.count += 1);
        }
    }

    /// Notifies all subscribers, because some notifications may have been missed.
    pub(crate) fn notify_all(&self) {
        self.senders().values().for_each(|sender| sender.send_modify(|state| state.count += 1));
    }

    /// Closes all channels. What was on its way may have been missed. `channel` is the state that they are in now.
    ///
    /// Notifies the subscribers whose channel was open, and those who waited for one to open that is refused now; not
    /// those who know already.
    pub(crate) fn close(&self, channel: ChannelState) {
        for sender in self.senders().values() {
            sender.send_if_modified(|state| {
                let was_open = state.channel == ChannelState::Open;
                let notifies = was_open || (state.channel, channel) == (ChannelState::Opening, ChannelState::Refused);
                *state = State { count: state.count + u64::from(notifies), channel };
                notifies
            });
        }
    }

    /// Sets the state of these channels, and notifies their subscribers, who check what has happened before.
    fn set_channel<'a>(&self, keys: impl IntoIterator<Item = &'a Bytes>, channel: ChannelState) {
        let senders = self.senders();
        for sender in keys.into_iter().filter_map(|key| senders.get(key)) {
            sender.send_modify(|state| *state = State { count: state.count + 1, channel });
        }
    }

    /// Opens the channels of all `wanted` keys. Notifies the subscribers of those that were not open, and of those that
    /// were `added`, since something may have been missed there.
    pub(crate) fn open<'a>(&self, wanted: impl IntoIterator<Item = &'a Bytes>, added: &[Bytes]) {
        self.set_channel(added, ChannelState::Open);
        let senders = self.senders();
        for sender in wanted.into_iter().filter_map(|key| senders.get(key)) {
            sender.send_if_modified(|state| {
                let opens = state.channel != ChannelState::Open;
                if opens {
                    *state = State { count: state.count + 1, channel: ChannelState::Open };
                }
                opens
            });
        }
    }

    /// Returns the keys that somebody is subscribed to.
    pub(crate) fn keys(&self) -> Vec<Bytes> {
        self.senders().keys().cloned().collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.senders().len()
    }

    fn senders(&self) -> MutexGuard<'_, Senders> {
        lock(&self.0)
    }
}

/// Nothing panics while it holds this mutex, so a poisoned one is still valid.
fn lock(senders: &Mutex<Senders>) -> MutexGuard<'_, Senders> {
    senders.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Subscriptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriptions").field("keys", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::timeout;

    use super::*;

    fn key() -> Bytes {
        Bytes::from("k")
    }

    async fn is_notified(subscription: &mut Subscription) -> bool {
        timeout(Duration::from_millis(1), subscription.notified()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_between_a_mark_and_the_wait_is_not_missed() {
        let subscriptions = Subscriptions::new();
        let (mut subscription, first) = subscriptions.subscribe(key(), ChannelState::Open);
        assert!(first && !is_notified(&mut subscription).await);
        subscription.mark();
        subscriptions.notify(b"k");
        assert!(is_notified(&mut subscription).await);
        assert!(!is_notified(&mut subscription).await);
        subscriptions.notify(b"k");
        subscription.mark();
        assert!(!is_notified(&mut subscription).await);
        subscriptions.notify_all();
        assert!(is_notified(&mut subscription).await);
    }

    #[tokio::test(start_paused = true)]
    async fn several_sources_are_open_when_most_are() {
        let sources: Vec<Subscriptions> = (0..3).map(|_| Subscriptions::new()).collect();
        let mut subscription =
            Subscription::join(sources.iter().map(|source| source.subscribe(key(), ChannelState::Opening).0));
        assert!(timeout(Duration::from_secs(60), subscription.opened()).await.is_err());
        sources[0].set_channel([&key()], ChannelState::Open);
        assert!(timeout(Duration::from_secs(60), subscription.opened()).await.is_err());
        sources[1].set_channel([&key()], ChannelState::Refused);
        sources[2].set_channel([&key()], ChannelState::Open);
        subscription.opened().await;
        assert!(subscription.is_open());
        sources[1].notify(b"k");
        assert!(is_notified(&mut subscription).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_that_is_refused_is_not_waited_for() {
        let subscriptions = Subscriptions::new();
        let (mut subscription, _) = subscriptions.subscribe(key(), ChannelState::Opening);
        subscriptions.set_channel([&key()], ChannelState::Refused);
        subscription.opened().await;
        assert!(!subscription.is_open());
    }

    /// Counts how often it is asked to run.
    #[derive(Default)]
    struct Counting(AtomicU32);

    impl Feed for Counting {
        fn keep_running(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waiters_keep_their_feed_running() {
        let (subscriptions, feed) = (Subscriptions::new(), Arc::new(Counting::default()));
        let asked = || feed.0.swap(0, Ordering::Relaxed);
        let mut subscription = subscriptions.subscribe(key(), ChannelState::Opening).0.fed_by(&feed);
        assert!(timeout(CHECK_EVERY * 10 + CHECK_EVERY / 2, subscription.opened()).await.is_err());
        assert!(asked() > 10);
        subscriptions.set_channel([&key()], ChannelState::Open);
        subscription.opened().await;
        subscription.mark();
        asked();
        assert!(timeout(CHECK_EVERY * 10 + CHECK_EVERY / 2, subscription.notified()).await.is_err());
        assert_eq!(asked(), 11);
        // Nobody waits.
        sleep(CHECK_EVERY * 10).await;
        assert_eq!(asked(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_that_closes_notifies_once() {
        let subscriptions = Subscriptions::new();
        let (mut subscription, _) = subscriptions.subscribe(key(), ChannelState::Open);
        subscriptions.close(ChannelState::Opening);
        assert!(is_notified(&mut subscription).await && !subscription.is_open());
        subscriptions.close(ChannelState::Opening);
        assert!(!is_notified(&mut subscription).await);
        subscriptions.close(ChannelState::Refused);
        assert!(is_notified(&mut subscription).await);
        for channel in [ChannelState::Refused, ChannelState::Opening] {
            subscriptions.close(channel);
            assert!(!is_notified(&mut subscription).await);
        }
        subscriptions.open([&key()], &[]);
        assert!(is_notified(&mut subscription).await && subscription.is_open());
    }

    #[test]
    fn a_key_goes_with_its_last_subscription() {
        let subscriptions = Subscriptions::new();
        let (subscription, first) = subscriptions.subscribe(key(), ChannelState::Open);
        let (again, second) = subscriptions.subscribe(key(), ChannelState::Open);
        assert!(first && !second);
        drop(subscription);
        assert_eq!(subscriptions.keys(), [key()]);
        drop(again);
        assert_eq!(subscriptions.len(), 0);
        assert!(subscriptions.subscribe(key(), ChannelState::Open).1);
    }

    #[test]
    fn subscriptions_that_come_and_go_on_many_threads_leave_nothing_and_miss_nothing() {
        let subscriptions = Arc::new(Subscriptions::new());
        let threads = [0; 4].map(|_| {
            let subscriptions = subscriptions.clone();
            std::thread::spawn(move || {
                for _ in 0..5_000 {
                    let (mut subscription, _) = subscriptions.subscribe(key(), ChannelState::Open);
                    subscription.mark();
                    subscriptions.notify(b"k");
                    assert!(subscription.0[0].state.has_changed().unwrap());
                }
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(subscriptions.len(), 0);
    }
}
