//! Searches a model, and says what was found.

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

use stateright::{Checker, Model};

/// Every promise holds in every state that can be reached, and there are more of those than `floor`.
pub(crate) fn holds<M>(model: M, floor: usize)
where
    M: Model<State: Debug + Hash + PartialEq + Clone + Send + Sync, Action: Debug + PartialEq + Clone>
        + Send
        + Sync
        + 'static,
{
    let started = Instant::now();
    let checker = model.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, up to {depth} steps deep, in {:?}", started.elapsed());
    checker.assert_properties();
    assert!(states > floor, "only {states} states");
}

/// The promise falls. Prints the shortest way there.
pub(crate) fn falls<M>(promise: &'static str, model: M)
where
    M: Model<State: Debug + Hash + PartialEq + Clone + Send + Sync, Action: Debug + PartialEq + Clone>
        + Send
        + Sync
        + 'static,
{
    let started = Instant::now();
    let steps = model.checker().spawn_bfs().join().assert_any_discovery(promise).into_actions();
    println!("not \"{promise}\", in {} steps, found in {:?}:", steps.len(), started.elapsed());
    steps.iter().for_each(|step| println!("  {step:?}"));
}
