//! News of a key: that it may have become free.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, poll_fn};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use tokio::sync::watch;

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
    /// Not yet.
    #[default]
    Opening,
    Open,
    /// It can't be had.
    Refused,
}

/// Listens to the news of one key, from one source or several.
#[derive(Debug)]
pub(crate) struct Listening(Vec<watch::Receiver<News>>);

impl Listening {
    /// News from any of them.
    pub(crate) fn join(parts: impl IntoIterator<Item = Self>) -> Self {
        Self(parts.into_iter().flat_map(|part| part.0).collect())
    }

    /// From here on, news are what comes later.
    pub(crate) fn mark(&mut self) {
        for news in &mut self.0 {
            news.mark_unchanged();
        }
    }

    /// Whether nothing that happens now is missed. Of several sources, most speak of all that happens.
    pub(crate) fn is_open(&self) -> bool {
        let open = self.0.iter().filter(|news| news.borrow().line == Line::Open).count();
        open > self.0.len() / 2
    }

    /// Waits until it is open, or can't be.
    pub(crate) async fn opened(&mut self) {
        loop {
            // Marked before the look: what changes after it is news.
            self.mark();
            if self.is_open() || self.0.iter().all(|news| news.borrow().line != Line::Opening) {
                return;
            }
            self.news().await;
        }
    }

    /// Waits for news since the last [`mark`](Listening::mark), or news that came.
    pub(crate) async fn news(&mut self) {
        let mut sources: Vec<_> = self.0.iter_mut().map(|news| Box::pin(news.changed())).collect();
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
    pub(crate) fn later(mut self, delay: std::time::Duration) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let sender = watch::Sender::new(News { count: 0, line: Line::Open });
        let listening = Self(vec![sender.subscribe()]);
        let carry = async move {
            loop {
                tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    () = self.news() => {}
                }
                tokio::time::sleep(delay).await;
                sender.send_modify(|news| news.count += 1);
            }
        };
        (listening, carry)
    }
}

/// Who listens to what.
pub(crate) struct Listeners<K>(Mutex<HashMap<K, watch::Sender<News>>>);

impl<K: Hash + Eq + Clone> Listeners<K> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(HashMap::new()))
    }

    /// Listens to a key. Answers also whether nobody has until now.
    pub(crate) fn listen(&self, key: K, line: Line) -> (Listening, bool) {
        let mut listeners = self.listeners();
        let mut first = false;
        let sender = listeners.entry(key).or_insert_with(|| {
            first = true;
            watch::Sender::new(News { count: 0, line })
        });
        (Listening(vec![sender.subscribe()]), first)
    }

    /// Tells who listens to the key.
    pub(crate) fn tell(&self, key: &K) {
        let mut listeners = self.listeners();
        let Some(sender) = listeners.get(key) else { return };
        if sender.receiver_count() == 0 {
            listeners.remove(key);
            return;
        }
        // The wakers of tasks only schedule them: nothing of others runs under the mutex.
        sender.send_modify(|news| news.count += 1);
    }

    /// Tells all. Something may have happened that nobody has heard.
    pub(crate) fn tell_all(&self) {
        self.listeners().values().for_each(|sender| sender.send_modify(|news| news.count += 1));
    }

    /// The line to these keys is as told from now on. Who listens looks for itself what has happened before.
    pub(crate) fn set_line<'a>(&self, keys: impl IntoIterator<Item = &'a K>, line: Line)
    where
        K: 'a,
    {
        let listeners = self.listeners();
        for sender in keys.into_iter().filter_map(|key| listeners.get(key)) {
            sender.send_modify(|news| *news = News { count: news.count + 1, line });
        }
    }

    /// The lines to all that is wanted are open, and something may have been missed where they were not before.
    pub(crate) fn open<'a>(&self, wanted: impl IntoIterator<Item = &'a K>, added: &[K])
    where
        K: 'a,
    {
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

    /// The keys that somebody listens to. Forgets all others.
    pub(crate) fn keys(&self) -> Vec<K> {
        let mut listeners = self.listeners();
        listeners.retain(|_, sender| sender.receiver_count() > 0);
        listeners.keys().cloned().collect()
    }

    /// How many keys are known here, whether anybody still listens to them or not.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.listeners().len()
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn listeners(&self) -> MutexGuard<'_, HashMap<K, watch::Sender<News>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq + Clone> fmt::Debug for Listeners<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listeners").field("keys", &self.listeners().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn has_news(listening: &mut Listening) -> bool {
        timeout(Duration::from_millis(1), listening.news()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_between_a_mark_and_the_wait_is_not_missed() {
        let listeners = Listeners::new();
        let (mut listening, first) = listeners.listen("k", Line::Open);
        assert!(first && !has_news(&mut listening).await);
        listening.mark();
        listeners.tell(&"k");
        assert!(has_news(&mut listening).await);
        assert!(!has_news(&mut listening).await);
        listeners.tell(&"k");
        listening.mark();
        assert!(!has_news(&mut listening).await);
        listeners.tell_all();
        assert!(has_news(&mut listening).await);
    }

    #[tokio::test(start_paused = true)]
    async fn several_sources_are_open_when_most_are() {
        let sources: Vec<Listeners<&str>> = (0..3).map(|_| Listeners::new()).collect();
        let mut listening = Listening::join(sources.iter().map(|source| source.listen("k", Line::Opening).0));
        assert!(timeout(Duration::from_secs(60), listening.opened()).await.is_err());
        sources[0].set_line([&"k"], Line::Open);
        assert!(timeout(Duration::from_secs(60), listening.opened()).await.is_err());
        sources[1].set_line([&"k"], Line::Refused);
        sources[2].set_line([&"k"], Line::Open);
        listening.opened().await;
        assert!(listening.is_open());
        sources[1].tell(&"k");
        assert!(has_news(&mut listening).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_is_refused_is_not_waited_for() {
        let listeners = Listeners::new();
        let (mut listening, _) = listeners.listen("k", Line::Opening);
        listeners.set_line([&"k"], Line::Refused);
        listening.opened().await;
        assert!(!listening.is_open());
    }

    #[test]
    fn who_has_gone_is_forgotten() {
        let listeners = Listeners::new();
        let (listening, _) = listeners.listen("k", Line::Open);
        let (again, first) = listeners.listen("k", Line::Open);
        assert!(!first);
        drop((listening, again));
        assert!(listeners.keys().is_empty());
        assert!(listeners.listen("k", Line::Open).1);
    }
}
