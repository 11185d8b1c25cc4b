//! News of a key: that it may have become free.
//!
//! 1. A key is known here as long as somebody listens to it: the last listener that goes removes it.
//! 2. Those who wait for news keep what brings them running: before they wait, and every [`LOOK_EVERY`] while they do,
//!    they ask each [`Messenger`] to start again if it has ended or stands still. So a line that is not open opens
//!    again while anybody waits, and whoever waits is notified when it does.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use fred::bytes::Bytes;
use tokio::select;
use tokio::sync::watch;
use tokio::time::sleep;

/// How often a waiter makes sure that its news can reach it.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What is known of the news of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct News {
    /// Counts what has happened: who has seen a number misses nothing that comes after.
    count: u64,
    line: Line,
}

/// Whether what happens is heard of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Line {
    /// Not yet, or not for the moment.
    #[default]
    Opening,
    Open,
    /// It can't be had for now.
    Refused,
}

/// Brings the news from elsewhere, with a task that may end or stand still.
pub(crate) trait Messenger: Send + Sync {
    /// Starts the task again, on a runtime that runs, if it has ended or stands still. Called from within a runtime,
    /// by those who wait; it is cheap, and keeps nobody waiting.
    fn keep_running(self: Arc<Self>);
}

/// Listens to the news of one key, from one source or several.
pub(crate) struct Listening(Vec<Source>);

struct Source {
    news: watch::Receiver<News>,
    /// `None` for news from within this process.
    messenger: Option<Arc<dyn Messenger>>,
    /// Dropped after the receiver, which is then counted no more.
    _entry: Entry,
}

/// What is to be removed with the last listener.
struct Entry {
    senders: Arc<Mutex<Senders>>,
    key: Bytes,
}

type Senders = HashMap<Bytes, watch::Sender<News>>;

impl Drop for Entry {
    fn drop(&mut self) {
        let removed = {
            let mut senders = lock(&self.senders);
            // Another may have removed it, and yet another may listen again: who finds that nobody does, removes it.
            let is_unused = senders.get(&self.key).is_some_and(|sender| sender.receiver_count() == 0);
            is_unused.then(|| senders.remove(&self.key))
        };
        drop(removed);
    }
}

impl Listening {
    /// News from any of them.
    pub(crate) fn join(parts: impl IntoIterator<Item = Self>) -> Self {
        Self(parts.into_iter().flat_map(|part| part.0).collect())
    }

    /// The same news, brought by this messenger.
    pub(crate) fn brought_by(mut self, messenger: &Arc<impl Messenger + 'static>) -> Self {
        for source in &mut self.0 {
            source.messenger = Some(messenger.clone());
        }
        self
    }

    /// From here on, news are what comes later.
    pub(crate) fn mark(&mut self) {
        for source in &mut self.0 {
            source.news.mark_unchanged();
        }
    }

    /// Whether nothing that happens now is missed. Of several sources, most speak of all that happens.
    pub(crate) fn is_open(&self) -> bool {
        let open = self.0.iter().filter(|source| source.news.borrow().line == Line::Open).count();
        open > self.0.len() / 2
    }

    /// Waits until it is open, or can't be.
    pub(crate) async fn opened(&mut self) {
        loop {
            // A line that was refused for want of somebody who opens it is opening then.
            self.keep_running();
            // Marked before the look: what changes after it is news.
            self.mark();
            if self.is_open() || self.0.iter().all(|source| source.news.borrow().line != Line::Opening) {
                return;
            }
            self.news().await;
        }
    }

    /// Waits for news since the last [`mark`](Listening::mark), or news that came. Has lines opened that are not.
    pub(crate) async fn news(&mut self) {
        loop {
            let has_messenger = self.keep_running();
            select! {
                biased;
                () = self.changed() => return,
                () = async { sleep(LOOK_EVERY).await }, if has_messenger => {}
            }
        }
    }

    /// Returns whether there is anything to keep running.
    fn keep_running(&self) -> bool {
        let messengers = self.0.iter().filter_map(|source| source.messenger.clone());
        messengers.map(Messenger::keep_running).count() > 0
    }

    async fn changed(&mut self) {
        let mut sources: Vec<_> = self.0.iter_mut().map(|source| Box::pin(source.news.changed())).collect();
        poll_fn(|context| {
            let mut heard = false;
            sources.retain_mut(|news| match news.as_mut().poll(context) {
                Poll::Ready(Ok(())) => {
                    heard = true;
                    false
                }
                // A source that has gone is silent for ever.
                Poll::Ready(Err(_)) => false,
                Poll::Pending => true,
            });
            if heard { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// The same news, each so much later. The future carries them, as long as somebody listens.
    #[cfg(test)]
    pub(crate) fn later(mut self, delay: Duration) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let sender = watch::Sender::new(News { count: 0, line: Line::Open });
        let entry = Entry { senders: Arc::default(), key: Bytes::new() };
        let listening = Self(vec![Source { news: sender.subscribe(), messenger: None, _entry: entry }]);
        let carry = async move {
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    () = self.news() => {}
                }
                sleep(delay).await;
                sender.send_modify(|news| news.count += 1);
            }
        };
        (listening, carry)
    }
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let news: Vec<News> = self.0.iter().map(|source| *source.news.borrow()).collect();
        f.debug_tuple("Listening").field(&news).finish()
    }
}

/// Who listens to what.
pub(crate) struct Listeners(Arc<Mutex<Senders>>);

impl Listeners {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// Listens to a key. Answers also whether nobody has until now.
    pub(crate) fn listen(&self, key: Bytes, line: Line) -> (Listening, bool) {
        let mut listeners = self.listeners();
        let mut first = false;
        let sender = listeners.entry(key.clone()).or_insert_with(|| {
            first = true;
            watch::Sender::new(News { count: 0, line })
        });
        let news = sender.subscribe();
        drop(listeners);
        let _entry = Entry { senders: self.0.clone(), key };
        (Listening(vec![Source { news, messenger: None, _entry }]), first)
    }

    /// Tells who listens to the key.
    pub(crate) fn tell(&self, key: &[u8]) {
        // The wakers of tasks only schedule them: nothing of others runs under the mutex.
        if let Some(sender) = self.listeners().get(key) {
            sender.send_modify(|news| news.count += 1);
        }
    }

    /// Tells all. Something may have happened that nobody has heard.
    pub(crate) fn tell_all(&self) {
        self.listeners().values().for_each(|sender| sender.send_modify(|news| news.count += 1));
    }

    /// No line is open any more, and what was on its way may have been missed. `line` says what is to be expected.
    ///
    /// Who waited for a line to open is notified when it won't; who has heard that before, is not.
    pub(crate) fn close(&self, line: Line) {
        for sender in self.listeners().values() {
            sender.send_if_modified(|news| {
                let tells = news.line == Line::Open || (news.line, line) == (Line::Opening, Line::Refused);
                *news = News { count: news.count + u64::from(tells), line };
                tells
            });
        }
    }

    /// The line to these keys is as told from now on. Who listens looks for itself what has happened before.
    fn set_line<'a>(&self, keys: impl IntoIterator<Item = &'a Bytes>, line: Line) {
        let listeners = self.listeners();
        for sender in keys.into_iter().filter_map(|key| listeners.get(key)) {
            sender.send_modify(|news| *news = News { count: news.count + 1, line });
        }
    }

    /// The lines to all that is wanted are open, and something may have been missed where they were not before.
    pub(crate) fn open<'a>(&self, wanted: impl IntoIterator<Item = &'a Bytes>, added: &[Bytes]) {
        self.set_line(added, Line::Open);
        let listeners = self.listeners();
        for sender in wanted.into_iter().filter_map(|key| listeners.get(key)) {
            sender.send_if_modified(|news| {
                let opens = news.line != Line::Open;
                if opens {
                    *news = News { count: news.count + 1, line: Line::Open };
                }
                opens
            });
        }
    }

    /// The keys that somebody listens to.
    pub(crate) fn keys(&self) -> Vec<Bytes> {
        self.listeners().keys().cloned().collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.listeners().len()
    }

    fn listeners(&self) -> MutexGuard<'_, Senders> {
        lock(&self.0)
    }
}

/// No code panics while it holds this mutex, so a poisoned one would be as good as any.
fn lock(senders: &Mutex<Senders>) -> MutexGuard<'_, Senders> {
    senders.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listeners").field("keys", &self.len()).finish()
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

    async fn has_news(listening: &mut Listening) -> bool {
        timeout(Duration::from_millis(1), listening.news()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_between_a_mark_and_the_wait_is_not_missed() {
        let listeners = Listeners::new();
        let (mut listening, first) = listeners.listen(key(), Line::Open);
        assert!(first && !has_news(&mut listening).await);
        listening.mark();
        listeners.tell(b"k");
        assert!(has_news(&mut listening).await);
        assert!(!has_news(&mut listening).await);
        listeners.tell(b"k");
        listening.mark();
        assert!(!has_news(&mut listening).await);
        listeners.tell_all();
        assert!(has_news(&mut listening).await);
    }

    #[tokio::test(start_paused = true)]
    async fn several_sources_are_open_when_most_are() {
        let sources: Vec<Listeners> = (0..3).map(|_| Listeners::new()).collect();
        let mut listening = Listening::join(sources.iter().map(|source| source.listen(key(), Line::Opening).0));
        assert!(timeout(Duration::from_secs(60), listening.opened()).await.is_err());
        sources[0].set_line([&key()], Line::Open);
        assert!(timeout(Duration::from_secs(60), listening.opened()).await.is_err());
        sources[1].set_line([&key()], Line::Refused);
        sources[2].set_line([&key()], Line::Open);
        listening.opened().await;
        assert!(listening.is_open());
        sources[1].tell(b"k");
        assert!(has_news(&mut listening).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_is_refused_is_not_waited_for() {
        let listeners = Listeners::new();
        let (mut listening, _) = listeners.listen(key(), Line::Opening);
        listeners.set_line([&key()], Line::Refused);
        listening.opened().await;
        assert!(!listening.is_open());
    }

    /// Counts how often it is asked to run.
    #[derive(Default)]
    struct Counting(AtomicU32);

    impl Messenger for Counting {
        fn keep_running(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_keep_their_messenger_running() {
        let (listeners, messenger) = (Listeners::new(), Arc::new(Counting::default()));
        let asked = || messenger.0.swap(0, Ordering::Relaxed);
        let mut listening = listeners.listen(key(), Line::Opening).0.brought_by(&messenger);
        assert!(timeout(LOOK_EVERY * 10 + LOOK_EVERY / 2, listening.opened()).await.is_err());
        assert!(asked() > 10);
        listeners.set_line([&key()], Line::Open);
        listening.opened().await;
        listening.mark();
        asked();
        assert!(timeout(LOOK_EVERY * 10 + LOOK_EVERY / 2, listening.news()).await.is_err());
        assert_eq!(asked(), 11);
        // Nobody waits.
        sleep(LOOK_EVERY * 10).await;
        assert_eq!(asked(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_closes_is_news_once() {
        let listeners = Listeners::new();
        let (mut listening, _) = listeners.listen(key(), Line::Open);
        listeners.close(Line::Opening);
        assert!(has_news(&mut listening).await && !listening.is_open());
        listeners.close(Line::Opening);
        assert!(!has_news(&mut listening).await);
        listeners.close(Line::Refused);
        assert!(has_news(&mut listening).await);
        for line in [Line::Refused, Line::Opening] {
            listeners.close(line);
            assert!(!has_news(&mut listening).await);
        }
        listeners.open([&key()], &[]);
        assert!(has_news(&mut listening).await && listening.is_open());
    }

    #[test]
    fn a_key_goes_with_its_last_listener() {
        let listeners = Listeners::new();
        let (listening, first) = listeners.listen(key(), Line::Open);
        let (again, second) = listeners.listen(key(), Line::Open);
        assert!(first && !second);
        drop(listening);
        assert_eq!(listeners.keys(), [key()]);
        drop(again);
        assert_eq!(listeners.len(), 0);
        assert!(listeners.listen(key(), Line::Open).1);
    }

    #[test]
    fn listeners_that_come_and_go_on_many_threads_leave_nothing_and_miss_nothing() {
        let listeners = Arc::new(Listeners::new());
        let threads = [0; 4].map(|_| {
            let listeners = listeners.clone();
            std::thread::spawn(move || {
                for _ in 0..5_000 {
                    let (mut listening, _) = listeners.listen(key(), Line::Open);
                    listening.mark();
                    listeners.tell(b"k");
                    assert!(listening.0[0].news.has_changed().unwrap());
                }
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(listeners.len(), 0);
    }
}
