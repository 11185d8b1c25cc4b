//! One measurement: starts the processes of waiters together, and evaluates their logs.

use std::collections::HashMap;
use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tenure_test_support::Server;

use crate::counters::{Counters, Observer};
use crate::statistics::median;
use crate::waiters::Contender;
use crate::{Crowd, WAIT};

/// Nanoseconds of the system's monotonic clock, which all processes share. `Instant` reads it too, but can't be sent.
pub(crate) type Nanos = u64;

pub(crate) fn now() -> Nanos {
    let time = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a monotonic clock"));
    nanos(time)
}

pub(crate) fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(Nanos::MAX)
}

/// The message of a process that is ready.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ready {
    /// The median round trip of a PING.
    pub(crate) ping: Nanos,
}

/// The message that starts the process.
#[derive(Serialize, Deserialize)]
pub(crate) struct Span {
    pub(crate) start: Nanos,
    pub(crate) end: Nanos,
}

/// The message at the end, for each of its waiters.
#[derive(Serialize, Deserialize)]
pub(crate) struct Log {
    pub(crate) turns: Vec<Turn>,
    /// When the waiter asked for the lock that it was still waiting for at the end.
    pub(crate) asked_in_vain: Option<Nanos>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Turn {
    pub(crate) asked: Nanos,
    pub(crate) obtained: Nanos,
    /// When the release was called.
    pub(crate) released: Nanos,
}

/// The result of one contender in one round.
pub(crate) struct Sample {
    pub(crate) turns_a_second: f64,
    pub(crate) handed_over_percent: f64,
    /// Not a number if nothing was handed over.
    pub(crate) p50_micros: f64,
    pub(crate) p99_micros: f64,
    pub(crate) ping_micros: f64,
    pub(crate) calls_a_turn: f64,
    pub(crate) commands_a_turn: f64,
    /// The most turns of a waiter divided by the fewest. Infinite if one had none.
    pub(crate) most_to_fewest: f64,
    pub(crate) longest_wait_millis: f64,
    pub(crate) server_micros_a_turn: f64,
}

impl Sample {
    pub(crate) fn p50_to_ping(&self) -> f64 {
        self.p50_micros / self.ping_micros
    }

    /// Turns a second that went to another waiter than the last one.
    pub(crate) fn handed_over_a_second(&self) -> f64 {
        self.turns_a_second * self.handed_over_percent / 100.0
    }
}

/// The time before counting starts, to warm up connections, scripts, caches and a queue.
const WARM_UP: Duration = Duration::from_millis(300);
/// The time before and after the measurement, so that all waiters are there from its beginning to its end.
const MARGIN: Duration = Duration::from_millis(50);

pub(crate) fn measure(
    contender: &Contender,
    crowd: Crowd,
    length: Duration,
    server: &Server,
    observer: &mut Observer,
) -> Result<Sample, String> {
    // A separate key: leftovers of an earlier measurement belong to another key.
    let key = format!("handoff:{}", now());
    // One after the other, so that each process has the machine to itself for its PINGs.
    let started = (0..crowd.processes).map(|_| Process::start(contender, crowd, &server.url(), &key));
    let mut processes = started.collect::<Result<Vec<Process>, String>>()?;
    let ping_micros = median(processes.iter().map(|process| process.ready.ping as f64)) / 1e3;

    let start = now() + nanos(MARGIN);
    let begin = start + nanos(WARM_UP);
    let end = begin + nanos(length + MARGIN);
    for process in &mut processes {
        process.say(&Span { start, end })?;
    }
    sleep_until(begin);
    let before = (observer.look(), now());
    sleep_until(begin + nanos(length));
    let after = (observer.look(), now());
    let logs = processes.into_iter().map(Process::end).collect::<Result<Vec<Vec<Log>>, String>>()?;
    let logs: Vec<Log> = logs.into_iter().flatten().collect();
    Ok(evaluate(contender, &logs, before, after, ping_micros))
}

fn sleep_until(then: Nanos) {
    thread::sleep(Duration::from_nanos(then.saturating_sub(now())));
}

/// A copy of this program, with its waiters.
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    ready: Ready,
}

impl Process {
    /// Waits until the copy is ready.
    fn start(contender: &Contender, crowd: Crowd, url: &str, key: &str) -> Result<Self, String> {
        let mut copy = Command::new(env::current_exe().map_err(|error| error.to_string())?);
        let (waiters, hold) = (crowd.waiters.to_string(), crowd.hold.as_micros().to_string());
        copy.args([WAIT, contender.name, &waiters, &hold, url, key]);
        let mut child = copy.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
        let stdin = child.stdin.take().ok_or("no standard input")?;
        let mut stdout = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        let ready = hear(&mut stdout)?;
        Ok(Self { child, stdin, stdout, ready })
    }

    fn say(&mut self, span: &Span) -> Result<(), String> {
        let line = serde_json::to_string(span).map_err(|error| error.to_string())?;
        writeln!(self.stdin, "{line}").map_err(|error| error.to_string())
    }

    fn end(mut self) -> Result<Vec<Log>, String> {
        let logs = hear(&mut self.stdout)?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(logs) } else { Err(format!("a process of waiters ended with {status}")) }
    }
}

/// Reads one message of a process.
fn hear<T: for<'a> Deserialize<'a>>(stdout: &mut BufReader<ChildStdout>) -> Result<T, String> {
    let mut line = String::new();
    stdout.read_line(&mut line).map_err(|error| error.to_string())?;
    serde_json::from_str(&line).map_err(|error| format!("a process of waiters has failed: {error}"))
}

type Look = (Counters, Nanos);

fn evaluate(contender: &Contender, logs: &[Log], before: Look, after: Look, ping_micros: f64) -> Sample {
    let ((before, begin), (after, end)) = (before, after);
    let counted = |turn: &Turn| (begin..end).contains(&turn.obtained);
    let mut turns: Vec<(usize, Turn)> = Vec::new();
    for (waiter, log) in logs.iter().enumerate() {
        turns.extend(log.turns.iter().filter(|turn| counted(turn)).map(|turn| (waiter, *turn)));
    }
    turns.sort_unstable_by_key(|(_, turn)| turn.obtained);

    let mut hand_offs = histogram();
    for pair in turns.windows(2) {
        let [(last, released), (next, obtained)] = pair else { continue };
        let pause = obtained.obtained.checked_sub(released.released);
        // The ttl is longer than all of this: two waiters that hold the lock at once would be a bug.
        let pause = pause.expect("one holder at a time");
        if last != next {
            hand_offs.saturating_record(pause);
        }
    }

    let mut turns_of: HashMap<usize, u32> = (0..logs.len()).map(|waiter| (waiter, 0)).collect();
    for (waiter, _) in &turns {
        *turns_of.entry(*waiter).or_default() += 1;
    }
    let most = turns_of.values().copied().max().unwrap_or_default();
    let fewest = turns_of.values().copied().min().unwrap_or_default();

    let ended = turns.iter().map(|(_, turn)| turn.obtained - turn.asked);
    let in_vain = logs.iter().filter_map(|log| Some(end.saturating_sub(log.asked_in_vain?)));
    let longest_wait = ended.chain(in_vain).max().unwrap_or_default();

    let count = turns.len() as f64;
    Sample {
        turns_a_second: count / Duration::from_nanos(end - begin).as_secs_f64(),
        handed_over_percent: 100.0 * hand_offs.len() as f64 / (count - 1.0),
        p50_micros: micros_at(&hand_offs, 0.5),
        p99_micros: micros_at(&hand_offs, 0.99),
        ping_micros,
        calls_a_turn: (after.calls(contender.sends) - before.calls(contender.sends)) as f64 / count,
        // One of the commands was the first look.
        commands_a_turn: (after.commands() - before.commands() - 1) as f64 / count,
        most_to_fewest: f64::from(most) / f64::from(fewest),
        longest_wait_millis: longest_wait as f64 / 1e6,
        server_micros_a_turn: 1e6 * (after.cpu_seconds() - before.cpu_seconds()) / count,
    }
}

/// Creates a histogram of nanoseconds, up to a minute, to three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, nanos(Duration::from_secs(60)), 3).expect("sound bounds")
}

fn micros_at(times: &Histogram<u64>, quantile: f64) -> f64 {
    match times.is_empty() {
        true => f64::NAN,
        false => times.value_at_quantile(quantile) as f64 / 1e3,
    }
}
