//! Searches a model, and prints what was found.

use std::fmt::Debug;
use std::hash::Hash;
use std::time::Instant;

use stateright::{Checker, Model};

/// Asserts that every promise holds in every reachable state, and that there are more states than `floor`.
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

/// Asserts that the promise is broken, and prints the shortest way there.
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
