//! Keepers that have nothing to do for now.
//!
//! Most locks are released long before their first renewal, and the others rest from one renewal to the next. A task
//! for each of them, with a timer of its own, would cost more than all else that the client does for it. So a renewer
//! runs while there is something to do: a renewal or the deadline is due, or the guard was dropped. Otherwise it stands
//! in the scheduler of its runtime, whose one task sleeps until the first of them is due.
//!
//! What is due for several at a time is done for all of them at once, and none of them needs to run.
//!
//! 1. A renewer stands in the scheduler, or aside while its errand is run, or runs, or is gone. Whoever takes it out
//!    decides which.
//! 2. One that was called while it ran does not rest before it has looked again. One that was called while it stood
//!    aside runs at once, and its errand concerns it no more.
//! 3. A scheduler ends when nobody stands in it nor may come back, and with its runtime. What stands in it then is
//!    dropped, as a task is whose runtime ends.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::{self, Handle};
use tokio::select;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

/// What can stand in a scheduler.
pub(crate) trait Job: Sized + Send + 'static {
    /// What is due for one, where it can be done for many at once.
    type DueRenewal: Send + 'static;
    /// What became of it.
    type Outcome: Send + 'static;
    /// Why it has to be done again.
    type Failure: Send + 'static;

    /// Does what there is to do; first of all about this failure of an errand. Answers itself, and when there is more,
    /// or nothing if there never will be.
    fn run(self, failure: Option<Self::Failure>) -> impl Future<Output = Option<(Self, Instant)>> + Send + 'static;

    /// What can be done along with others', if that is all there is to do. Asked under the scheduler's mutex.
    fn errand(&self, now: Instant) -> Option<Self::DueRenewal>;

    /// Does it for all of them. Answers in their order.
    fn run_errands(errands: Vec<Self::DueRenewal>) -> impl Future<Output = Vec<Self::Outcome>> + Send + 'static;

    /// Takes note of it. Answers when there is more to do; or that it has to run now, and because of which failure.
    fn conclude(&self, errand: Self::Outcome) -> Result<Instant, Option<Self::Failure>>;
}

/// The schedulers of one locker: one for each runtime that it is used on.
pub(crate) struct Schedulers<W: Job>(Mutex<Vec<(runtime::Id, Arc<Scheduler<W>>)>>);

struct Scheduler<W> {
    state: Mutex<State<W>>,
    /// Tells the task to look at the state again.
    changed: Notify,
}

struct State<W> {
    /// By the time when each has something to do.
    waiting: BTreeMap<Due, Arc<Seat<W>>>,
    /// Those that have something to do now.
    called: Vec<(Arc<Seat<W>>, W)>,
    /// How many may come back: those that run, are about to, or stand aside.
    away: usize,
    /// The number of the last that was entered.
    last: u64,
    /// When the task wakes up by itself.
    wakes: Option<Instant>,
    over: bool,
}

/// When it is due, and its number.
type Due = (Instant, u64);

/// Where one is. Changed under the mutex of its scheduler only.
struct Seat<W> {
    number: u64,
    phase: Mutex<Phase<W>>,
}

enum Phase<W> {
    Stands {
        due: Instant,
        work: W,
    },
    /// While its errand is run.
    Aside(W),
    /// Or is about to, or is gone.
    Runs {
        called: bool,
    },
}

/// How long the task stays when nothing stands in the scheduler any more: who obtains lock after lock would start one
/// after the other.
const LINGER: Duration = Duration::from_millis(500);

/// So many are started at a time, and then others after [`PAUSE`]. Locks that were obtained together are due together:
/// were they all started at once, the memory that they take while they run would be many times what they take while
/// they rest.
const AT_A_TIME: usize = 288;
/// Less than so many calls take, so that this delays nothing that would not have to wait for its turn anyway.
const PAUSE: Duration = Duration::from_millis(1);

/// Where one was entered.
pub(crate) struct ScheduleHandle<W: Job> {
    scheduler: Arc<Scheduler<W>>,
    seat: Arc<Seat<W>>,
}

impl<W: Job> Schedulers<W> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Enters what has nothing to do until then. Where the runtime has ended it is dropped.
    pub(crate) fn enter(&self, work: W, due: Instant, runtime: &Handle) -> ScheduleHandle<W> {
        // A scheduler may end just when it is found; a second one that does has no runtime.
        let found = self.scheduler(runtime);
        match found.enter(work, due) {
            Ok(seat) => ScheduleHandle { scheduler: found, seat },
            Err(work) => {
                let scheduler = self.scheduler(runtime);
                let seat = scheduler.enter(work, due).unwrap_or_else(|work| {
                    drop(work);
                    Seat::new(0, Phase::Runs { called: false })
                });
                ScheduleHandle { scheduler, seat }
            }
        }
    }

    fn scheduler(&self, runtime: &Handle) -> Arc<Scheduler<W>> {
        let mut schedulers = self.schedulers();
        // They are few.
        match schedulers.iter().find(|(id, _)| *id == runtime.id()) {
            // The id of a runtime that is gone may be given again.
            Some((_, scheduler)) if !scheduler.state().over => scheduler.clone(),
            _ => {
                let scheduler = Arc::new(Scheduler::new());
                schedulers.retain(|(_, scheduler)| !scheduler.state().over);
                schedulers.push((runtime.id(), scheduler.clone()));
                drop(schedulers);
                runtime.spawn(Scheduler::run(Running(scheduler.clone())));
                scheduler
            }
        }
    }

    fn schedulers(&self) -> MutexGuard<'_, Vec<(runtime::Id, Arc<Scheduler<W>>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Job> Drop for Schedulers<W> {
    fn drop(&mut self) {
        for (_, scheduler) in &*self.schedulers() {
            scheduler.state().over = true;
            scheduler.changed.notify_one();
        }
    }
}

impl<W: Job> ScheduleHandle<W> {
    /// There is something to do now. Works on any thread.
    pub(crate) fn call(&self) {
        let mut state = self.scheduler.state();
        let Some(work) = state.take(&self.seat) else { return };
        state.called.push((self.seat.clone(), work));
        drop(state);
        self.scheduler.changed.notify_one();
    }

    /// There will be nothing to do. What runs looks once more, and finds that.
    pub(crate) fn leave(&self) {
        let mut state = self.scheduler.state();
        let work = state.take(&self.seat);
        state.away -= usize::from(work.is_some());
        drop(state);
        // Its drop may wake others: not under the mutex.
        drop(work);
    }
}

impl<W> Seat<W> {
    fn new(number: u64, phase: Phase<W>) -> Arc<Self> {
        Arc::new(Self { number, phase: Mutex::new(phase) })
    }

    /// From here on it runs, if it did not before.
    fn begin(&self) -> Option<W> {
        match mem::replace(&mut *self.phase(), Phase::Runs { called: false }) {
            Phase::Stands { work, .. } | Phase::Aside(work) => Some(work),
            Phase::Runs { .. } => None,
        }
    }

    /// As [`begin`](Self::begin), for one that stands aside.
    fn come_back(&self) -> Option<W> {
        let mut phase = self.phase();
        match mem::replace(&mut *phase, Phase::Runs { called: false }) {
            Phase::Aside(work) => Some(work),
            other => {
                *phase = other;
                None
            }
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase<W>> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Job> State<W> {
    /// Takes out who stands there, or aside: it is away from here on. Who runs is called (invariant 2).
    fn take(&mut self, seat: &Seat<W>) -> Option<W> {
        let mut phase = seat.phase();
        match mem::replace(&mut *phase, Phase::Runs { called: false }) {
            Phase::Stands { due, work } => {
                self.waiting.remove(&(due, seat.number));
                self.away += 1;
                Some(work)
            }
            Phase::Aside(work) => Some(work),
            Phase::Runs { .. } => {
                *phase = Phase::Runs { called: true };
                None
            }
        }
    }

    /// Has one rest that was away. Answers it where it may not, as it was called meanwhile (invariant 2).
    fn rest(&mut self, seat: &Arc<Seat<W>>, work: W, due: Instant) -> Option<W> {
        let mut phase = seat.phase();
        if let Phase::Runs { called: true } = *phase {
            *phase = Phase::Runs { called: false };
            return Some(work);
        }
        *phase = Phase::Stands { due, work };
        self.waiting.insert((due, seat.number), seat.clone());
        self.away -= 1;
        None
    }

    /// Takes out some that have something to do: those for whom it is time, and those who were called. The first come
    /// first, as renewals can come too late.
    fn take_due(&mut self, now: Instant) -> Taken<W> {
        let mut taken = Taken { runs: Vec::new(), members: Vec::new(), errands: Vec::new() };
        while taken.len() < AT_A_TIME {
            let Some(first) = self.waiting.first_entry().filter(|first| first.key().0 <= now) else { break };
            let seat = first.remove();
            let Some(work) = seat.begin() else { continue };
            self.away += 1;
            match work.errand(now) {
                Some(errand) => {
                    *seat.phase() = Phase::Aside(work);
                    taken.members.push(seat);
                    taken.errands.push(errand);
                }
                None => taken.runs.push((seat, work)),
            }
        }
        // One alone shares with nobody.
        if let [alone] = &*taken.members {
            taken.runs.extend(alone.begin().map(|work| (alone.clone(), work)));
            taken.members.clear();
        }
        taken.runs.extend(self.called.drain(..self.called.len().min(AT_A_TIME - taken.len())));
        taken
    }

    /// Nobody stands there, nor may come back.
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.called.is_empty() && self.away == 0
    }
}

/// Who was taken out.
struct Taken<W: Job> {
    runs: Vec<(Arc<Seat<W>>, W)>,
    /// Who stands aside, each with its errand.
    members: Vec<Arc<Seat<W>>>,
    errands: Vec<W::DueRenewal>,
}

impl<W: Job> Taken<W> {
    fn len(&self) -> usize {
        self.runs.len() + self.members.len()
    }
}

impl<W: Job> Scheduler<W> {
    fn new() -> Self {
        let (waiting, called) = (BTreeMap::new(), Vec::new());
        let state = State { waiting, called, away: 0, last: 0, wakes: None, over: false };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Unless it is over: without its task nobody would ever look at what stands in it.
    fn enter(&self, work: W, due: Instant) -> Result<Arc<Seat<W>>, W> {
        let mut state = self.state();
        if state.over {
            return Err(work);
        }
        state.last += 1;
        let seat = Seat::new(state.last, Phase::Stands { due, work });
        state.waiting.insert((due, seat.number), seat.clone());
        self.wake_by(state, due);
        Ok(seat)
    }

    /// The task looks at the state at that time, or sooner.
    fn wake_by(&self, state: MutexGuard<'_, State<W>>, due: Instant) {
        let sooner = state.wakes.is_none_or(|wakes| due < wakes);
        drop(state);
        if sooner {
            self.changed.notify_one();
        }
    }

    async fn run(running: Running<W>) {
        let scheduler = &running.0;
        let mut called = true;
        loop {
            let (taken, wakes) = {
                let (mut state, now) = (scheduler.state(), Instant::now());
                let taken = state.take_due(now);
                if state.is_empty() && (state.over || !called) {
                    state.over = true;
                    return;
                }
                let wakes = state.waiting.keys().next().map_or(now + LINGER, |next| next.0.min(now + LINGER));
                state.wakes = Some(wakes);
                (taken, wakes)
            };
            let are_all = taken.len() < AT_A_TIME;
            let Taken { runs, members, errands } = taken;
            for (seat, work) in runs {
                scheduler.start(seat, work, None);
            }
            if !members.is_empty() {
                tokio::spawn(Crew { scheduler: scheduler.clone(), members }.run(errands));
            }
            if are_all {
                select! {
                    () = scheduler.changed.notified() => called = true,
                    () = sleep_until(wakes) => called = false,
                }
            } else {
                sleep(PAUSE).await;
            }
        }
    }

    /// Has it run in a task of its own.
    fn start(self: &Arc<Self>, seat: Arc<Seat<W>>, work: W, failure: Option<W::Failure>) {
        tokio::spawn(Shift { scheduler: self.clone(), seat, rests: false }.run(work, failure));
    }

    /// Who of these still stands aside, runs from here on.
    fn take_back<'a>(&self, members: &'a [Arc<Seat<W>>]) -> Vec<(&'a Arc<Seat<W>>, Option<W>)> {
        let _state = self.state();
        members.iter().map(|seat| (seat, seat.come_back())).collect()
    }

    /// Answers those who may not, as they were called meanwhile.
    fn have_rest<'a>(&self, rests: Vec<(&'a Arc<Seat<W>>, W, Instant)>) -> Vec<(&'a Arc<Seat<W>>, W)> {
        let mut state = self.state();
        if state.over {
            // With the runtime. To drop them wakes others: not under the mutex.
            drop(state);
            drop(rests);
            return Vec::new();
        }
        let Some(first) = rests.iter().map(|&(_, _, due)| due).min() else { return Vec::new() };
        let rest = |(seat, work, due)| Some((seat, state.rest(seat, work, due)?));
        let called = rests.into_iter().filter_map(rest).collect();
        self.wake_by(state, first);
        called
    }

    /// No code panics while it holds this mutex, so a poisoned one would be as good as any.
    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task of one that runs, until it rests again or is gone.
struct Shift<W: Job> {
    scheduler: Arc<Scheduler<W>>,
    seat: Arc<Seat<W>>,
    rests: bool,
}

impl<W: Job> Shift<W> {
    async fn run(mut self, mut work: W, mut failure: Option<W::Failure>) {
        while let Some((more, due)) = work.run(failure.take()).await {
            match self.rest(more, due) {
                Some(called) => work = called,
                None => return,
            }
        }
    }

    /// Answers what may not rest, as it was called meanwhile.
    fn rest(&mut self, work: W, due: Instant) -> Option<W> {
        let mut state = self.scheduler.state();
        if state.over {
            // With the runtime. To drop it wakes others: not under the mutex.
            drop(state);
            drop(work);
            return None;
        }
        let called = state.rest(&self.seat, work, due);
        if called.is_none() {
            self.rests = true;
            self.scheduler.wake_by(state, due);
        }
        called
    }
}

impl<W: Job> Drop for Shift<W> {
    fn drop(&mut self) {
        if !self.rests {
            self.scheduler.state().away -= 1;
        }
    }
}

/// The task of several whose errands are run together.
struct Crew<W: Job> {
    scheduler: Arc<Scheduler<W>>,
    /// Who stands aside meanwhile, unless called.
    members: Vec<Arc<Seat<W>>>,
}

impl<W: Job> Crew<W> {
    async fn run(mut self, errands: Vec<W::DueRenewal>) {
        let outcomes = W::run_errands(errands).await;
        // It ends here: from now on they may stand aside for another.
        let members = mem::take(&mut self.members);
        let (mut rests, mut runs) = (Vec::with_capacity(members.len()), Vec::new());
        for ((seat, work), outcome) in self.scheduler.take_back(&members).into_iter().zip(outcomes) {
            // It was called: it runs then, or is gone, and this is nothing to it.
            let Some(work) = work else { continue };
            match work.conclude(outcome) {
                Ok(due) => rests.push((seat, work, due)),
                Err(failure) => runs.push((seat, work, failure)),
            }
        }
        let called = self.scheduler.have_rest(rests).into_iter().map(|(seat, work)| (seat, work, None));
        for (seat, work, failure) in runs.into_iter().chain(called) {
            self.scheduler.start(seat.clone(), work, failure);
        }
    }
}

impl<W: Job> Drop for Crew<W> {
    /// Where it ends with its runtime, or by a panic, so do those who stand aside.
    fn drop(&mut self) {
        let gone = self.scheduler.take_back(&self.members);
        // To drop them wakes others: not under the mutex.
        self.scheduler.state().away -= gone.iter().filter(|(_, work)| work.is_some()).count();
    }
}

/// The scheduler's task, as long as it runs.
struct Running<W: Job>(Arc<Scheduler<W>>);

impl<W: Job> Drop for Running<W> {
    fn drop(&mut self) {
        let (waiting, called) = {
            let mut state = self.0.state();
            state.over = true;
            let waiting: Vec<_> = mem::take(&mut state.waiting).into_values().filter_map(|seat| seat.begin()).collect();
            (waiting, mem::take(&mut state.called))
        };
        // Ends what they keep: not under the mutex, as that wakes others.
        drop((waiting, called));
    }
}

impl<W: Job> fmt::Debug for Schedulers<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schedulers").field("runtimes", &self.schedulers().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;
    use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, error::TryRecvError, unbounded_channel};
    use tokio::time::advance;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    macro_rules! runs_by_itself {
        () => {
            type DueRenewal = ();
            type Outcome = ();
            type Failure = ();

            fn errand(&self, _: Instant) -> Option<()> {
                None
            }

            async fn run_errands(_: Vec<()>) -> Vec<()> {
                Vec::new()
            }

            fn conclude(&self, (): ()) -> Result<Instant, Option<()>> {
                Err(None)
            }
        };
    }

    /// Tells that it runs, and when it is dropped without.
    struct Named(&'static str, UnboundedSender<String>);

    impl Job for Named {
        runs_by_itself!();

        async fn run(mut self, _: Option<()>) -> Option<(Self, Instant)> {
            self.1.send(format!("{} runs", self.0)).unwrap();
            self.0 = "";
            None
        }
    }

    impl Drop for Named {
        fn drop(&mut self) {
            if !self.0.is_empty() {
                self.1.send(format!("{} dropped", self.0)).unwrap();
            }
        }
    }

    /// Tells that it runs, for a while, and rests until each of these, the last first.
    struct Resting {
        rests: Vec<Instant>,
        lasts: Duration,
        sender: UnboundedSender<()>,
    }

    impl Job for Resting {
        runs_by_itself!();

        async fn run(mut self, _: Option<()>) -> Option<(Self, Instant)> {
            self.sender.send(()).unwrap();
            sleep(self.lasts).await;
            self.rests.pop().map(|until| (self, until))
        }
    }

    /// Has an errand that takes 50 ms, which it tells along with the others', and then what is planned.
    struct Along {
        number: usize,
        has_errand: bool,
        then: Then,
        told: UnboundedSender<Told>,
    }

    #[derive(Clone, Copy)]
    enum Then {
        Rests(Instant),
        Runs(Option<&'static str>),
    }

    #[derive(Debug, PartialEq)]
    enum Told {
        Together(Vec<usize>),
        Runs(usize, Option<&'static str>),
        Dropped(usize),
    }

    impl Job for Along {
        type DueRenewal = (usize, UnboundedSender<Told>);
        type Outcome = usize;
        type Failure = &'static str;

        async fn run(self, failure: Option<&'static str>) -> Option<(Self, Instant)> {
            self.told.send(Told::Runs(self.number, failure)).unwrap();
            None
        }

        fn errand(&self, _: Instant) -> Option<Self::DueRenewal> {
            self.has_errand.then(|| (self.number, self.told.clone()))
        }

        async fn run_errands(errands: Vec<Self::DueRenewal>) -> Vec<usize> {
            let numbers: Vec<_> = errands.iter().map(|errand| errand.0).collect();
            errands[0].1.send(Told::Together(numbers.clone())).unwrap();
            sleep(ms(50)).await;
            numbers
        }

        fn conclude(&self, outcome: usize) -> Result<Instant, Option<&'static str>> {
            assert_eq!(outcome, self.number, "another's");
            match self.then {
                Then::Rests(until) => Ok(until),
                Then::Runs(failure) => Err(failure),
            }
        }
    }

    impl Drop for Along {
        fn drop(&mut self) {
            // The last that is heard of it.
            drop(self.told.send(Told::Dropped(self.number)));
        }
    }

    /// Some that are due together in 100 ms.
    struct Together {
        places: Vec<ScheduleHandle<Along>>,
        told: UnboundedReceiver<Told>,
        start: Instant,
        _rosters: Schedulers<Along>,
    }

    impl Together {
        fn enter(then: impl IntoIterator<Item = Then>, has_errand: impl Fn(usize) -> bool) -> Self {
            let (sender, told) = unbounded_channel();
            let (schedulers, start) = (Schedulers::new(), Instant::now());
            let enter = |(number, then)| {
                let along = Along { number, has_errand: has_errand(number), then, told: sender.clone() };
                schedulers.enter(along, start + ms(100), &Handle::current())
            };
            let places = then.into_iter().enumerate().map(enter).collect();
            Self { places, told, start, _rosters: schedulers }
        }

        async fn next(&mut self) -> (Duration, Told) {
            let told = self.told.recv().await.unwrap();
            (self.start.elapsed(), told)
        }
    }

    fn schedulers() -> (Schedulers<Named>, UnboundedSender<String>, UnboundedReceiver<String>) {
        let (sender, receiver) = unbounded_channel();
        (Schedulers::new(), sender, receiver)
    }

    fn tasks() -> usize {
        Handle::current().metrics().num_alive_tasks()
    }

    #[tokio::test(start_paused = true)]
    async fn each_runs_when_it_is_due_also_when_it_came_later_than_others() {
        let (schedulers, sender, mut told) = schedulers();
        let start = Instant::now();
        let runtime = Handle::current();
        let _late = schedulers.enter(Named("late", sender.clone()), start + ms(900), &runtime);
        sleep(ms(100)).await;
        let _soon = schedulers.enter(Named("soon", sender.clone()), start + ms(300), &runtime);
        assert_eq!(told.recv().await.unwrap(), "soon runs");
        assert_eq!(start.elapsed(), ms(300));
        assert_eq!(told.recv().await.unwrap(), "late runs");
        assert_eq!(start.elapsed(), ms(900));
    }

    #[tokio::test(start_paused = true)]
    async fn who_rests_stands_there_again() {
        let (schedulers, start) = (Schedulers::new(), Instant::now());
        let (sender, mut told) = unbounded_channel();
        let rests = Resting { rests: vec![start + ms(500), start + ms(300)], lasts: ms(10), sender };
        let place = schedulers.enter(rests, start + ms(100), &Handle::current());
        for expected in [100, 300, 500] {
            told.recv().await.unwrap();
            assert_eq!(start.elapsed(), ms(expected));
            assert_eq!(tasks(), 2, "the scheduler's, and its own");
            sleep(ms(50)).await;
            assert_eq!(tasks(), 1);
        }
        assert_eq!(told.recv().await, None, "gone");
        place.call();
        place.leave();
        sleep(LINGER).await;
        assert_eq!(tasks(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_that_are_due_together_not_all_start_at_once() {
        let (schedulers, start) = (Schedulers::new(), Instant::now());
        let (sender, mut told) = unbounded_channel();
        let places: Vec<_> = (0..2 * AT_A_TIME + 1)
            .map(|_| Resting { rests: Vec::new(), lasts: Duration::ZERO, sender: sender.clone() })
            .map(|rests| schedulers.enter(rests, start + ms(100), &Handle::current()))
            .collect();
        drop(sender);
        let mut started = Vec::new();
        while let Some(()) = told.recv().await {
            started.push(start.elapsed());
        }
        let (first, others) = started.split_at(AT_A_TIME);
        let (second, last) = others.split_at(AT_A_TIME);
        assert!(first.iter().all(|at| *at == ms(100)) && second.iter().all(|at| *at == ms(101)));
        assert_eq!(last, [ms(102)]);
        drop(places);
    }

    #[tokio::test(start_paused = true)]
    async fn who_rests_can_be_called_and_can_leave() {
        for (called, expected) in [(true, Some(())), (false, None)] {
            let (schedulers, start) = (Schedulers::new(), Instant::now());
            let (sender, mut told) = unbounded_channel();
            let rests = Resting { rests: vec![start + ms(60_000)], lasts: ms(10), sender };
            let place = schedulers.enter(rests, start + ms(100), &Handle::current());
            told.recv().await.unwrap();
            sleep(ms(50)).await;
            if called {
                place.call();
            } else {
                place.leave();
            }
            assert_eq!(told.recv().await, expected);
            assert_eq!(start.elapsed(), ms(150));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_called_while_it_ran_looks_again_before_it_rests() {
        let (schedulers, start) = (Schedulers::new(), Instant::now());
        let (sender, mut told) = unbounded_channel();
        let rests = Resting { rests: vec![start + ms(900), start + ms(800)], lasts: ms(100), sender };
        let place = schedulers.enter(rests, start, &Handle::current());
        told.recv().await.unwrap();
        sleep(ms(50)).await;
        place.call();
        place.call();
        told.recv().await.unwrap();
        assert_eq!(start.elapsed(), ms(100));
        told.recv().await.unwrap();
        assert_eq!(start.elapsed(), ms(900));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_for_several_is_done_together_and_none_of_them_runs() {
        let until = Instant::now() + ms(300);
        let mut along = Together::enter([Then::Rests(until); 3], |_| true);
        for at in [100, 300] {
            assert_eq!(along.next().await, (ms(at), Told::Together(vec![0, 1, 2])));
            assert_eq!(tasks(), 2, "the scheduler's, and theirs");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_called_while_its_errand_is_run_runs_at_once_and_who_leaves_is_gone() {
        let until = Instant::now() + ms(60_000);
        let mut along = Together::enter([Then::Rests(until); 4], |_| true);
        assert_eq!(along.next().await.1, Told::Together(vec![0, 1, 2, 3]));
        sleep(ms(20)).await;
        along.places[2].leave();
        assert_eq!(along.next().await, (ms(120), Told::Dropped(2)));
        along.places[1].call();
        along.places[1].call();
        assert_eq!(along.next().await, (ms(120), Told::Runs(1, None)));
        assert_eq!(along.next().await, (ms(120), Told::Dropped(1)));
        sleep(ms(100)).await;
        // The others rest, and can be called and leave as ever.
        along.places[0].call();
        assert_eq!(along.next().await, (ms(220), Told::Runs(0, None)));
        assert_eq!(along.next().await, (ms(220), Told::Dropped(0)));
        along.places[3].leave();
        assert_eq!(along.next().await, (ms(220), Told::Dropped(3)));
        sleep(LINGER * 2).await;
        assert_eq!(tasks(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn whose_errand_leaves_something_to_do_runs_and_knows_why() {
        let then = [Then::Runs(Some("failed")), Then::Rests(Instant::now() + ms(60_000)), Then::Runs(None)];
        let mut along = Together::enter(then, |_| true);
        assert_eq!(along.next().await, (ms(100), Told::Together(vec![0, 1, 2])));
        assert_eq!(along.next().await, (ms(150), Told::Runs(0, Some("failed"))));
        assert_eq!(along.next().await, (ms(150), Told::Dropped(0)));
        assert_eq!(along.next().await, (ms(150), Told::Runs(2, None)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_errand_runs_and_so_does_one_that_is_due_alone() {
        let until = Instant::now() + ms(60_000);
        let mut along = Together::enter([Then::Rests(until); 3], |number| number != 1);
        assert_eq!(along.next().await, (ms(100), Told::Runs(1, None)));
        assert_eq!(along.next().await, (ms(100), Told::Dropped(1)));
        assert_eq!(along.next().await, (ms(100), Told::Together(vec![0, 2])));
        let mut alone = Together::enter([Then::Rests(until)], |_| true);
        assert_eq!(alone.next().await, (ms(100), Told::Runs(0, None)));
    }

    #[test]
    fn a_runtime_that_ends_drops_those_whose_errand_is_run() {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let mut along = runtime.block_on(async {
            let mut along = Together::enter([Then::Runs(None); 2], |_| true);
            assert_eq!(along.next().await.1, Told::Together(vec![0, 1]));
            along
        });
        drop(runtime);
        let mut dropped = [(); 2].map(|()| along.told.blocking_recv().unwrap());
        dropped.sort_by_key(|told| format!("{told:?}"));
        assert_eq!(dropped, [Told::Dropped(0), Told::Dropped(1)]);
        along.places.iter().for_each(ScheduleHandle::call);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_called_runs_at_once_and_who_leaves_never() {
        let (schedulers, sender, mut told) = schedulers();
        let (due, runtime) = (Instant::now() + ms(900), Handle::current());
        let [a, b] = ["a", "b"].map(|name| schedulers.enter(Named(name, sender.clone()), due, &runtime));
        sleep(ms(1)).await;
        b.call();
        b.call();
        assert_eq!(told.recv().await.unwrap(), "b runs");
        assert_eq!(Instant::now() + ms(899), due);
        b.leave();
        a.leave();
        a.call();
        assert_eq!(told.recv().await.unwrap(), "a dropped");
        sleep(ms(2_000)).await;
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_ends_soon_after_the_last_has_left_and_another_begins_with_the_next() {
        let (schedulers, sender, mut told) = schedulers();
        let runtime = Handle::current();
        for _ in 0..3 {
            let place = schedulers.enter(Named("a", sender.clone()), Instant::now() + ms(60_000), &runtime);
            sleep(ms(5_000)).await;
            assert_eq!(tasks(), 1);
            place.leave();
            assert_eq!(told.recv().await.unwrap(), "a dropped");
            sleep(LINGER).await;
            assert_eq!(tasks(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_ends_with_the_locker() {
        let (schedulers, sender, _told) = schedulers();
        let place = schedulers.enter(Named("a", sender), Instant::now() + ms(60_000), &Handle::current());
        place.leave();
        drop(schedulers);
        advance(ms(1)).await;
        assert_eq!(tasks(), 0);
    }

    #[test]
    fn a_runtime_that_ends_drops_what_stands_there_and_refuses_more() {
        let (schedulers, sender, mut told) = schedulers();
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let handle = runtime.handle().clone();
        let due = Instant::now() + ms(60_000);
        let before = schedulers.enter(Named("before", sender.clone()), due, &handle);
        let resting_rosters = Schedulers::new();
        let (resting_sender, mut resting_told) = unbounded_channel();
        let resting = Resting { rests: vec![due], lasts: Duration::ZERO, sender: resting_sender };
        let resting = resting_rosters.enter(resting, Instant::now(), &handle);
        runtime.block_on(async {
            resting_told.recv().await.unwrap();
            sleep(ms(20)).await;
        });
        drop(runtime);
        assert_eq!(resting_told.blocking_recv(), None);
        resting.call();
        assert_eq!(told.blocking_recv().unwrap(), "before dropped");
        let after = schedulers.enter(Named("after", sender), due, &handle);
        assert_eq!(told.blocking_recv().unwrap(), "after dropped");
        for place in [before, after] {
            place.call();
            place.leave();
        }
    }
}
