//! A core for the server alone.
//!
//! A single task is up to four times as fast where the scheduler puts it on the server's core, as nobody is woken on
//! another one. Where it does so changes by chance, and would be taken for a difference between the rivals. A server is
//! rarely on its client's core.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The cores that this process may run on.
pub(crate) struct Cores {
    last: usize,
    /// The last one, too, if there is no other.
    others: Vec<usize>,
}

impl Cores {
    pub(crate) fn of_this_process() -> Self {
        let all = sched_getaffinity(THIS).expect("the cores");
        let mut others: Vec<_> = (0..CpuSet::count()).filter(|core| all.is_set(*core).unwrap_or(false)).collect();
        let last = others.pop().expect("a core");
        if others.is_empty() {
            others.push(last);
        }
        Self { last, others }
    }

    /// Keeps what is started from now on to the last core.
    pub(crate) fn keep_to_the_last(&self) {
        keep_to(&[self.last]);
    }

    /// Keeps what is started from now on to the other cores.
    pub(crate) fn keep_to_the_others(&self) {
        keep_to(&self.others);
    }
}

const THIS: Pid = Pid::from_raw(0);

fn keep_to(cores: &[usize]) {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core).expect("a core");
    }
    sched_setaffinity(THIS, &set).expect("cores");
}
