//! The pauses between attempts to obtain a lock.

use std::fmt;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

/// A strategy of pauses between attempts; when the pauses end, so do the attempts.
///
/// Set for one request with [`LockRequest::retry`](crate::LockRequest::retry) or for all with
/// [`LockerBuilder::retry`](crate::LockerBuilder::retry). A limit set with
/// [`wait_at_most`](crate::LockRequest::wait_at_most) wins over any strategy. A waiting request without a strategy
/// chooses its own pauses, and tries again no later than the end of the holder's ttl.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::Retry;
///
/// let ms = Duration::from_millis;
/// let three_pauses = Retry::exponential(ms(16), ms(50)).max_retries(3);
/// assert_eq!(three_pauses.pauses().collect::<Vec<_>>(), [ms(16), ms(32), ms(50)]);
///
/// let own = Retry::from_iter((1..).map(|n| Duration::from_millis(n * n)));
/// assert_eq!(own.pauses().take(3).collect::<Vec<_>>(), [ms(1), ms(4), ms(9)]);
/// ```
#[derive(Clone)]
pub struct Retry {
    make: Arc<dyn Fn() -> Pauses + Send + Sync>,
    limit: Option<usize>,
    jitter: Duration,
}

/// One run of a strategy's pauses.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::{Pauses, Retry};
///
/// let mut pauses: Pauses = Retry::linear(Duration::from_secs(1)).max_retries(2).pauses();
/// assert_eq!(pauses.next(), Some(Duration::from_secs(1)));
/// ```
pub type Pauses = Box<dyn Iterator<Item = Duration> + Send>;

impl Retry {
    /// Makes one attempt and no retries.
    ///
    /// ```
    /// assert_eq!(tenure::Retry::none().pauses().count(), 0);
    /// ```
    pub fn none() -> Self {
        Self::from_iter(iter::empty())
    }

    /// Repeats the same pause for ever.
    ///
    /// ```
    /// let ten_times_a_second = tenure::Retry::linear(std::time::Duration::from_millis(100));
    /// ```
    pub fn linear(pause: Duration) -> Self {
        Self::from_iter(iter::repeat(pause))
    }

    /// Doubles the pause each time, from `min` up to `max`.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let patient = tenure::Retry::exponential(Duration::from_millis(16), Duration::from_secs(1));
    /// ```
    pub fn exponential(min: Duration, max: Duration) -> Self {
        let double = move |pause: &Duration| Some(pause.saturating_mul(2).min(max));
        Self::from_iter(iter::successors(Some(min.min(max)), double))
    }

    /// Uses any pauses: an iterator of them (restarted for every request), or a function that returns one.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use tenure::Retry;
    ///
    /// let listed = Retry::from_iter([Duration::from_millis(5), Duration::from_secs(1)]);
    /// let made = Retry::from_iter(|| std::iter::repeat_with(|| Duration::from_millis(7)));
    /// # assert_eq!(listed.pauses().count(), 2);
    /// # assert_eq!(made.pauses().next(), Some(Duration::from_millis(7)));
    /// ```
    #[expect(clippy::should_implement_trait, reason = "`FromIterator` would have to collect what may be endless")]
    pub fn from_iter<Kind>(pauses: impl IntoPauses<Kind>) -> Self {
        Self { make: pauses.into_pauses(), limit: None, jitter: Duration::ZERO }
    }

    /// Allows at most `n` retries after the first attempt: `n` pauses, `n + 1` attempts. Of several limits, the
    /// smallest counts.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let four_attempts = tenure::Retry::linear(Duration::from_millis(100)).max_retries(3);
    /// assert_eq!(four_attempts.pauses().count(), 3);
    /// ```
    pub fn max_retries(self, n: usize) -> Self {
        Self { limit: Some(self.limit.map_or(n, |limit| limit.min(n))), ..self }
    }

    /// The former name of [`max_retries`](Retry::max_retries), which didn't say that the first attempt doesn't count.
    #[doc(hidden)]
    #[deprecated(note = "renamed to `max_retries`, which says what is limited")]
    pub fn limit(self, n: usize) -> Self {
        self.max_retries(n)
    }

    /// Adds a random time below `jitter` to every pause, so that many waiters don't all ask at once.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let ms = Duration::from_millis;
    /// let spread = tenure::Retry::linear(ms(100)).jitter(ms(200));
    /// ```
    pub fn jitter(self, jitter: Duration) -> Self {
        Self { jitter, ..self }
    }

    /// Returns the pauses of one request, from the beginning.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let second = Duration::from_secs(1);
    /// assert_eq!(tenure::Retry::linear(second).pauses().next(), Some(second));
    /// ```
    pub fn pauses(&self) -> Pauses {
        let jitter = self.jitter;
        let pauses = (self.make)().map(move |pause| pause.saturating_add(jitter.mul_f64(fastrand::f64())));
        match self.limit {
            Some(limit) => Box::new(pauses.take(limit)),
            None => Box::new(pauses),
        }
    }
}

impl fmt::Debug for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry").field("limit", &self.limit).field("jitter", &self.jitter).finish_non_exhaustive()
    }
}

/// What [`Retry::from_iter`] accepts: an iterator of pauses, or a function that returns one.
///
/// Implemented for everything that fits; `Kind` only distinguishes the two.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tenure::{IntoPauses, Retry};
///
/// fn spread<Kind>(pauses: impl IntoPauses<Kind>) -> Retry {
///     Retry::from_iter(pauses).jitter(Duration::from_millis(50))
/// }
///
/// let listed = spread([Duration::from_secs(1), Duration::from_secs(5)]);
/// let made = spread(|| std::iter::repeat(Duration::from_secs(1)));
/// # assert_eq!((listed.pauses().count(), made.pauses().take(3).count()), (2, 3));
/// ```
pub trait IntoPauses<Kind> {
    #[doc(hidden)]
    fn into_pauses(self) -> Arc<dyn Fn() -> Pauses + Send + Sync>;
}

impl<I> IntoPauses<()> for I
where
    I: IntoIterator<Item = Duration>,
    I::IntoIter: Clone + Send + Sync + 'static,
{
    fn into_pauses(self) -> Arc<dyn Fn() -> Pauses + Send + Sync> {
        let pauses = self.into_iter();
        Arc::new(move || Box::new(pauses.clone()))
    }
}

impl<F, I> IntoPauses<fn() -> I> for F
where
    F: Fn() -> I + Send + Sync + 'static,
    I: IntoIterator<Item = Duration>,
    I::IntoIter: Send + 'static,
{
    fn into_pauses(self) -> Arc<dyn Fn() -> Pauses + Send + Sync> {
        Arc::new(move || Box::new(self().into_iter()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn linear_repeats_and_none_is_empty() {
        assert_eq!(Retry::linear(ms(7)).pauses().take(2).collect::<Vec<_>>(), [ms(7); 2]);
        assert_eq!(Retry::none().pauses().count(), 0);
    }

    #[test]
    fn exponential_stays_between_its_floor_and_its_ceiling_at_any_attempt() {
        let pauses: Vec<_> = Retry::exponential(ms(1), Duration::MAX).pauses().take(200).collect();
        assert_eq!(pauses[..3], [ms(1), ms(2), ms(4)]);
        assert_eq!(pauses[199], Duration::MAX);
        assert!(Retry::exponential(ms(9), ms(5)).pauses().take(9).all(|pause| pause == ms(5)));
    }

    #[test]
    fn the_smaller_limit_counts() {
        assert_eq!(Retry::linear(ms(1)).max_retries(3).max_retries(9).pauses().count(), 3);
        assert_eq!(Retry::linear(ms(1)).max_retries(0).pauses().count(), 0);
    }

    #[test]
    fn jitter_adds_less_than_it_says_and_never_overflows() {
        let jittered = Retry::linear(ms(10)).jitter(ms(5));
        assert!(jittered.pauses().take(500).all(|pause| pause >= ms(10) && pause < ms(15)));
        assert_eq!(Retry::linear(Duration::MAX).jitter(Duration::MAX).pauses().next(), Some(Duration::MAX));
    }

    #[test]
    fn every_request_starts_afresh() {
        let retry = Retry::from_iter([ms(1), ms(2)]);
        assert_eq!(retry.pauses().collect::<Vec<_>>(), retry.pauses().collect::<Vec<_>>());
    }
}
