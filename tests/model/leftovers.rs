//! What one client's calls leave on one node of a quorum, once all of them have ended.
//!
//! One node is enough: nothing is taken back on one node because of a reply of another. The others grant the lock by
//! majority or don't, at any time. There is no clock either: a call that is given up on may run until it expires, at
//! once or much later. No key expires, so nothing relies on that.

use stateright::{Model, Property};

pub const UNDONE: &str = "when all calls have ended, nothing is left of a lock that is not held";
pub const UNTOUCHED: &str = "nothing of a lock that is held is taken back";

/// The safeguards against leftovers. A test turns one off and shows what is left.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A vote is taken back only when its call has ended.
    pub undo_after_call: bool,
    /// The undo of a vote with an unknown outcome is repeated until that vote can't run any longer.
    pub undo_until_latest: bool,
    /// A vote that came after the majority is taken back if the lock was released before it came.
    pub late_vote_undone: bool,
    /// The same holds for as long as a vote with an unknown outcome can run.
    pub doubt_outlives_call: bool,
    /// A vote that heals is taken back if the lock was released before it came.
    pub heal_undone: bool,
    /// The same holds for as long as a vote that heals can run, if its outcome is unknown.
    pub heal_doubt_outlives_call: bool,
}

impl Rules {
    pub const ALL: Self = Self {
        undo_after_call: true,
        undo_until_latest: true,
        late_vote_undone: true,
        doubt_outlives_call: true,
        heal_undone: true,
        heal_doubt_outlives_call: true,
    };
}

#[derive(Clone, Copy, Debug)]
pub struct Leftovers {
    pub rules: Rules,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeftoversState {
    /// Whether the node's key holds the client's token.
    key: bool,
    phase: Phase,
    vote: Call,
    heal: Call,
    release: Call,
    /// The undo of the vote, and of the vote that heals.
    undo_of_vote: Undo,
    undo_of_heal: Undo,
    /// Whether a step removed the key while the lock was held.
    was_touched: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Asking,
    /// There is no majority, or nobody waits for one any longer.
    Failed,
    Holding,
    Released,
}

/// A call to the node, and what its sender knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Call {
    Unsent,
    /// It has not run.
    Sent,
    /// It has run, and the reply is in flight: whether it was granted, or freed the key.
    Answered(bool),
    /// Nobody waits for it any longer, and it may still run.
    GivenUp,
    /// It was given up on, and can't run any longer.
    Unknown,
    /// The reply has come.
    Known(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Undo {
    /// It is not known whether an undo will be needed.
    Open,
    Due,
    /// Done, or not needed.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Vote,
    Heal,
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A majority grants the lock.
    Obtain,
    /// No majority grants it, or nobody waits for it.
    Fail,
    /// The holder releases the lock, and all open rounds of votes learn of it.
    Release,
    /// A renewal has found that the node has no key.
    Heal,
    /// The node runs a call,
    Run(Which),
    /// the caller gets the reply,
    Hear(Which),
    /// or gives up on it,
    GiveUp(Which),
    /// and it can't run any longer.
    Expire(Which),
    /// The client decides whether the vote, or the vote that heals, has to be taken back.
    Decide(Which),
    /// The node runs the undo.
    Undo(Which),
    /// The node restarts, and forgets everything.
    Forget,
}

impl Model for Leftovers {
    type State = LeftoversState;
    type Action = Step;

    fn init_states(&self) -> Vec<LeftoversState> {
        vec![LeftoversState {
            key: false,
            phase: Phase::Asking,
            vote: Call::Sent,
            heal: Call::Unsent,
            release: Call::Unsent,
            undo_of_vote: Undo::Open,
            undo_of_heal: Undo::Open,
            was_touched: false,
        }]
    }

    fn actions(&self, state: &LeftoversState, steps: &mut Vec<Step>) {
        match state.phase {
            Phase::Asking => steps.extend([Step::Obtain, Step::Fail]),
            Phase::Holding => steps.push(Step::Release),
            Phase::Failed | Phase::Released => {}
        }
        // The node has replied that it has no key, to a request that was sent after the vote on the same connection.
        if state.phase == Phase::Holding && state.heal == Call::Unsent && state.vote != Call::Sent {
            steps.push(Step::Heal);
        }
        if state.key {
            steps.push(Step::Forget);
        }
        for (which, call) in [(Which::Vote, state.vote), (Which::Heal, state.heal), (Which::Release, state.release)] {
            match call {
                Call::Sent => steps.extend([Step::Run(which), Step::GiveUp(which)]),
                Call::Answered(_) => steps.extend([Step::Hear(which), Step::GiveUp(which)]),
                Call::GivenUp => steps.extend([Step::Run(which), Step::Expire(which)]),
                Call::Unsent | Call::Unknown | Call::Known(_) => {}
            }
        }
        if self.may_decide_on_vote(state) {
            steps.push(Step::Decide(Which::Vote));
        }
        if self.may_decide_on_heal(state) {
            steps.push(Step::Decide(Which::Heal));
        }
        if state.undo_of_vote == Undo::Due {
            steps.push(Step::Undo(Which::Vote));
        }
        if state.undo_of_heal == Undo::Due {
            steps.push(Step::Undo(Which::Heal));
        }
    }

    fn next_state(&self, state: &LeftoversState, step: Step) -> Option<LeftoversState> {
        let mut next = *state;
        match step {
            Step::Obtain => next.phase = Phase::Holding,
            Step::Fail => next.phase = Phase::Failed,
            Step::Release => (next.phase, next.release) = (Phase::Released, Call::Sent),
            Step::Heal => next.heal = Call::Sent,
            Step::Forget => next.key = false,
            Step::Run(which) => next.run(which),
            Step::Hear(which) => {
                let call = next.call(which);
                if let Call::Answered(answer) = *call {
                    *call = Call::Known(answer);
                }
            }
            Step::GiveUp(which) => {
                let call = next.call(which);
                *call = if *call == Call::Sent { Call::GivenUp } else { Call::Unknown };
                next.try_again(which);
            }
            Step::Expire(which) => {
                *next.call(which) = Call::Unknown;
                next.try_again(which);
            }
            Step::Decide(Which::Vote) => next.undo_of_vote = self.decide_on_vote(state),
            Step::Decide(_) => {
                let is_needed = state.phase == Phase::Released && state.heal != Call::Known(false);
                next.undo_of_heal = if is_needed && self.rules.heal_undone { Undo::Due } else { Undo::Over };
            }
            Step::Undo(which) => {
                next.take_back();
                let may_run = *next.call(which) == Call::GivenUp && self.rules.undo_until_latest;
                *(if which == Which::Vote { &mut next.undo_of_vote } else { &mut next.undo_of_heal }) =
                    if may_run { Undo::Due } else { Undo::Over };
            }
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(UNDONE, |model: &Self, state: &LeftoversState| !(state.key && model.have_ended(state))),
            Property::always(UNTOUCHED, |_, state: &LeftoversState| !state.was_touched),
        ]
    }
}

impl Leftovers {
    /// `Round::leave` and `Round::finish`.
    fn may_decide_on_vote(&self, state: &LeftoversState) -> bool {
        let has_ended = match state.vote {
            Call::Known(_) | Call::Unknown => true,
            Call::GivenUp => state.phase == Phase::Failed || !self.rules.doubt_outlives_call,
            Call::Unsent | Call::Sent | Call::Answered(_) => {
                state.phase == Phase::Failed && !self.rules.undo_after_call
            }
        };
        has_ended && state.undo_of_vote == Undo::Open && state.phase != Phase::Asking
    }

    fn decide_on_vote(&self, state: &LeftoversState) -> Undo {
        let may_be_there = state.vote != Call::Known(false);
        let is_needed = match state.phase {
            Phase::Asking | Phase::Holding => false,
            Phase::Failed => true,
            // A release that has freed the key here came after the granted vote.
            Phase::Released => {
                let is_freed = state.release == Call::Known(true) && state.vote == Call::Known(true);
                self.rules.late_vote_undone && !is_freed
            }
        };
        if may_be_there && is_needed { Undo::Due } else { Undo::Over }
    }

    /// `Healing::heal`.
    fn may_decide_on_heal(&self, state: &LeftoversState) -> bool {
        let has_ended = match state.heal {
            Call::Known(_) | Call::Unknown => true,
            Call::GivenUp => !self.rules.heal_doubt_outlives_call,
            Call::Unsent | Call::Sent | Call::Answered(_) => false,
        };
        has_ended && state.undo_of_heal == Undo::Open
    }

    /// Returns whether nothing is or will be in flight, and the lock is not held.
    fn have_ended(&self, state: &LeftoversState) -> bool {
        let is_on_its_way = |call| matches!(call, Call::Sent | Call::Answered(_) | Call::GivenUp);
        let calls = [state.vote, state.heal, state.release];
        let is_open = |undo| undo == Undo::Due;
        matches!(state.phase, Phase::Failed | Phase::Released)
            && !calls.into_iter().any(is_on_its_way)
            && !self.may_decide_on_vote(state)
            && !self.may_decide_on_heal(state)
            && !is_open(state.undo_of_vote)
            && !is_open(state.undo_of_heal)
    }
}

impl LeftoversState {
    fn call(&mut self, which: Which) -> &mut Call {
        match which {
            Which::Vote => &mut self.vote,
            Which::Heal => &mut self.heal,
            Which::Release => &mut self.release,
        }
    }

    fn run(&mut self, which: Which) {
        let answer = match which {
            // A key that is already ours is granted too.
            Which::Vote | Which::Heal => true,
            Which::Release => self.key,
        };
        self.key = which != Which::Release;
        let call = self.call(which);
        // The client doesn't get the reply of a call that it gave up on.
        *call = if *call == Call::Sent { Call::Answered(answer) } else { Call::Unknown };
        self.try_again(which);
    }

    /// Sends a failed release again, until it gets a reply (`catch_up.rs`).
    fn try_again(&mut self, which: Which) {
        if which == Which::Release && self.release == Call::Unknown {
            self.release = Call::Sent;
        }
    }

    fn take_back(&mut self) {
        self.was_touched |= self.key && self.phase == Phase::Holding;
        self.key = false;
    }
}
