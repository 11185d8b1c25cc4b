//! What one client's calls leave on one node of a quorum, once all of them have ended.
//!
//! One node is enough: nothing is taken back on one for what another has said. The others say whether a majority grants
//! the lock, at any time and as they like. There is no time either: a call that is given up on may be run until
//! it can't be any more, and that may be at once or much later. No key expires: nothing is left to that.

use stateright::{Model, Property};

pub const UNDONE: &str = "when all calls have ended, nothing is left of a lock that is not held";
pub const UNTOUCHED: &str = "nothing of a lock that is held is taken back";

/// What sees to it. A test turns one off and shows what is left.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// A vote is taken back only when its call has ended.
    pub undo_after_call: bool,
    /// What takes a vote of unknown outcome back is repeated until that vote can't be run any more.
    pub undo_until_latest: bool,
    /// A vote that a majority was not waited for is taken back, if the lock was released before it came.
    pub late_vote_undone: bool,
    /// And the same holds for as long as one of unknown outcome can be run.
    pub doubt_outlives_call: bool,
    /// What brings the key back is taken back, if the lock was released before it came.
    pub heal_undone: bool,
    /// And for as long as that may be run, where its outcome is unknown.
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
    /// The node's key holds the client's token.
    key: bool,
    phase: Phase,
    vote: Call,
    heal: Call,
    release: Call,
    /// What takes the vote and what heals back, until it has.
    undo_of_vote: Undo,
    undo_of_heal: Undo,
    /// A step took the key away while the lock was held.
    was_touched: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Asking,
    /// No majority, or nobody waits for one any more.
    Failed,
    Holding,
    Released,
}

/// One call to the node, and what its sender knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Call {
    Unsent,
    /// It has not been run.
    Sent,
    /// It has been run, and the answer is on its way: it was granted, or freed the key, or not.
    Answered(bool),
    /// Nobody waits for it any more, and it may still be run.
    GivenUp,
    /// It was given up on, and can't be run any more.
    Unknown,
    /// The answer has come.
    Known(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Undo {
    /// Whether any will be needed is not known.
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
    /// None does, or nobody waits for it.
    Fail,
    /// The holder releases it, which all rounds of votes that are open then learn of.
    Release,
    /// A renewal has found that the node has no key.
    Heal,
    /// The node runs a call,
    Run(Which),
    /// which is answered,
    Hear(Which),
    /// or given up on,
    GiveUp(Which),
    /// and can't be run any more.
    Expire(Which),
    /// It is decided whether the vote, or what heals, has to be taken back.
    Decide(Which),
    /// The node takes it back.
    Undo(Which),
    /// The node is restarted, and knows nothing any more.
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
        // The node has said that it has no key, in answer to what was sent after the vote and on the same connection.
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
    /// `Round::leave` and `Round::finish`
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
            // A release that has freed the key here has come after the vote that was granted.
            Phase::Released => {
                let is_freed = state.release == Call::Known(true) && state.vote == Call::Known(true);
                self.rules.late_vote_undone && !is_freed
            }
        };
        if may_be_there && is_needed { Undo::Due } else { Undo::Over }
    }

    /// `Healing::heal`
    fn may_decide_on_heal(&self, state: &LeftoversState) -> bool {
        let has_ended = match state.heal {
            Call::Known(_) | Call::Unknown => true,
            Call::GivenUp => !self.rules.heal_doubt_outlives_call,
            Call::Unsent | Call::Sent | Call::Answered(_) => false,
        };
        has_ended && state.undo_of_heal == Undo::Open
    }

    /// Nothing is on its way, nor will be; and the lock is not held.
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
            // Ours already is granted too.
            Which::Vote | Which::Heal => true,
            Which::Release => self.key,
        };
        self.key = which != Which::Release;
        let call = self.call(which);
        // What was given up on is not heard.
        *call = if *call == Call::Sent { Call::Answered(answer) } else { Call::Unknown };
        self.try_again(which);
    }

    /// A release that failed is sent again, until it is answered (`catch_up.rs`).
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
