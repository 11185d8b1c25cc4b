//! The options, and the manual that `--help` prints.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use clap_complete::Shell;

/// Run commands under distributed locks on Redis and Valkey
///
/// Of all machines that run `tenure run KEY -- COMMAND` with the same key and server, one at a time runs its command.
/// The lock is renewed while the command runs. If it is lost, the command is ended before another machine can start.
#[derive(Debug, Parser)]
#[command(name = "tenure", version, propagate_version = true, arg_required_else_help = true, after_long_help = AFTER)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Print results, events and errors as JSON, one object per line
    #[arg(long, global = true, display_order = AFTER_THE_OTHERS)]
    pub(crate) json: bool,
}

/// Before `--help` and `--version`.
const AFTER_THE_OTHERS: usize = 998;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command while holding a lock
    #[command(long_about = RUN, after_long_help = AFTER_RUN)]
    Run(RunOptions),

    /// Show who holds locks
    ///
    /// Prints for each key whether it is held, what for, for how long unless it is renewed, and the fencing token.
    /// Where readers or permits share a key, each has a line. A lock that `--at-least` keeps taken after its command
    /// has ended has no holder. The tokens by which keys are held are secret, and never shown.
    #[command(after_long_help = AFTER_STATUS)]
    Status(StatusOptions),

    /// List the locks whose keys begin with a prefix
    ///
    /// Looks through all keys of the server with SCAN, in steps between which the server serves others. Lists strings
    /// with a ttl that have a fencing token beside them, or begin with a random token. So most locks of other libraries
    /// are left out; `tenure status KEY` shows those too.
    #[command(after_long_help = AFTER_LIST)]
    List(ListOptions),

    /// End a lock, whoever holds it
    ///
    /// Shows the holder, and asks before it ends the lock. The holder isn't asked, and goes on until its next renewal,
    /// up to a third of its ttl: so for that long there may be two holders. Ending the process that holds the lock is
    /// safer, where it can be reached. `tenure run` passes SIGTERM on to its command, and releases the lock when the
    /// command has ended. A command that ignores the signal keeps the lock.
    #[command(after_long_help = AFTER_BREAK)]
    Break(BreakOptions),

    /// Look for what endangers locks on a server
    ///
    /// Looks at eviction, persistence, replicas, the clock, the version, and at what the user may do. Says what is
    /// wrong, what that does to locks, and what to do. To find out what the user may do, it writes keys that begin with
    /// `tenure-probe-`, and deletes them.
    #[command(after_long_help = AFTER_DOCTOR)]
    Doctor(DoctorOptions),

    /// Print a script that completes commands and options in a shell
    ///
    /// For bash: tenure completions bash > /etc/bash_completion.d/tenure
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// The server, and how it is used.
#[derive(Debug, ClapArgs)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerOptions {
    /// The URL of the server; several for a quorum
    ///
    /// redis:// or valkey:// for one server, rediss:// with TLS, redis+unix:///path/to.sock,
    /// redis-sentinel://host:26379?sentinelServiceName=name, redis-cluster://host:port. With several URLs, or one
    /// argument with commas, a lock is held on a majority of independent servers. In a password, a comma is written as
    /// %2C. A password in an argument is seen by every user of the machine: put it in TENURE_URL. [default:
    /// redis://127.0.0.1:6379]
    #[arg(long, short = 'u', env = "TENURE_URL", hide_env_values = true, value_delimiter = ',', value_name = "URL")]
    pub(crate) url: Vec<String>,

    /// A prefix for every key at the server
    #[arg(long, env = "TENURE_PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,

    /// How long to wait for the server's reply to one command, and for a connection
    ///
    /// For a connection, no longer than a third of --ttl. Where there is no --ttl, no longer than 10s; with several
    /// URLs, no longer than a third of --restart-window either.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "2s", value_name = "TIME")]
    pub(crate) command_timeout: Duration,

    /// How long to go on trying to connect while the server is away
    #[arg(long, value_parser = humantime::parse_duration, default_value = "0s", value_name = "TIME")]
    pub(crate) wait_for_server: Duration,

    /// How many replicas must have a lock before it is held
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) min_replicas: usize,

    /// How long a node of a quorum doesn't vote after a restart; 0s if nodes never forget [default: 60s]
    ///
    /// All clients that share locks must use the same window. No ttl may be longer.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub(crate) restart_window: Option<Duration>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct RunOptions {
    /// The key of the lock
    pub(crate) key: String,

    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,

    /// For how long the server keeps the lock unless it is renewed
    ///
    /// At least 1s. It is renewed every third of that. If this machine dies, others wait this long.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s", value_name = "TIME")]
    pub(crate) ttl: Duration,

    /// Wait for the lock no longer than this [default: without limit]
    #[arg(long, short, value_parser = humantime::parse_duration, value_name = "TIME", conflicts_with = "no_wait")]
    pub(crate) wait: Option<Duration>,

    /// Don't wait: exit at once if another has the lock
    #[arg(long, short)]
    pub(crate) no_wait: bool,

    /// Wait in strict order of arrival, across all processes
    ///
    /// Has no effect on a quorum, which has no such order.
    #[arg(long)]
    pub(crate) fair: bool,

    /// Hold the key as a reader: together with other readers, and while nobody holds it without --read
    ///
    /// While a writer (a run without --read) waits, later readers wait behind it.
    #[arg(long)]
    pub(crate) read: bool,

    /// Run at most N commands at a time instead of one
    ///
    /// A run counts the commands already running, whatever N they were started with. Not available on a quorum.
    #[arg(long, value_name = "N", conflicts_with = "read", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) permits: Option<u32>,

    /// Keep the lock taken until this time has passed since it was obtained, even if the command ends before
    ///
    /// For a job that runs once per period on one of many machines, whose clocks disagree: longer than they are apart,
    /// shorter than the period.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub(crate) at_least: Option<Duration>,

    /// End the command, so that the lock is held no longer than this
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub(crate) at_most: Option<Duration>,

    /// How long the command has between SIGTERM and SIGKILL
    ///
    /// At most half of --ttl and --at-most. [default: 5s, or a quarter of these if that is less]
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub(crate) grace: Option<Duration>,

    /// What `tenure status` shows of the holder [default: host, process and program]
    #[arg(long, value_name = "TEXT")]
    pub(crate) metadata: Option<String>,

    /// The exit code if the lock is not obtained; with 0, nothing is printed either
    ///
    /// Cron mails what a job prints. With --not-obtained-code 0, a run that finds the lock taken is a success that says
    /// nothing.
    #[arg(long, default_value_t = 75, value_name = "CODE")]
    pub(crate) not_obtained_code: u8,

    /// The exit code if the lock is lost while the command runs
    #[arg(long, default_value_t = 76, value_name = "CODE")]
    pub(crate) lost_code: u8,

    #[command(flatten)]
    pub(crate) server: ServerOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StatusOptions {
    /// The keys of the locks
    #[arg(required = true)]
    pub(crate) keys: Vec<String>,

    /// Exit with 75 if one of them is held
    #[arg(long)]
    pub(crate) exit_code: bool,

    #[command(flatten)]
    pub(crate) server: ServerOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ListOptions {
    /// List only keys that begin with this; all if omitted
    #[arg(default_value = "", hide_default_value = true, value_name = "PREFIX")]
    pub(crate) starting_with: String,

    /// List no more than this
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    pub(crate) limit: usize,

    #[command(flatten)]
    pub(crate) server: ServerOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BreakOptions {
    /// The key of the lock
    pub(crate) key: String,

    /// Don't ask
    #[arg(long, short)]
    pub(crate) yes: bool,

    #[command(flatten)]
    pub(crate) server: ServerOptions,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DoctorOptions {
    /// The URL of the server, as for --url, which it replaces; several for a quorum
    #[arg(value_name = "URL", value_delimiter = ',')]
    pub(crate) urls: Vec<String>,

    #[command(flatten)]
    pub(crate) server: ServerOptions,
}

// Lines of at most 79 columns: clap breaks longer ones where the terminal ends, in the middle of a table.

const AFTER: &str = "\
Times are written as 500ms, 30s, 5m, 1h or 2days. `tenure help COMMAND` prints
more, including exit codes.

Examples:
  A cron job that runs on one of many machines:
    */10 * * * * tenure run import --no-wait --at-least 1m -- /opt/import
  Deploy one at a time, in order, and wait for up to an hour:
    tenure run deploy --wait 1h --fair -- ./deploy.sh
  No more than three at a time:
    tenure run render --permits 3 -- ./render.sh
  Who has it?
    tenure status deploy";

const RUN: &str = "\
Run a command while holding a lock

Waits for the lock, runs the command, and releases the lock when the command has ended. The command runs in a process \
group of its own, and the whole group is under the lock: when the command ends, what it has left running in its group \
is ended, too, before the lock is released.

The lock is renewed while the command runs. If the server can't be reached, renewals are retried. If none succeeds in \
time, the group gets SIGTERM and, after the grace period, SIGKILL, early enough that the whole group is gone before \
the server frees the lock. If the server replies that the lock is gone or taken, because it was deleted or the server \
lost its memory, the group gets SIGTERM at once, and SIGKILL after the grace period or when the lock would have ended, \
whichever is earlier.

What leaves its process group is not ended: a daemon that calls setsid, what `timeout` runs (without its option \
--foreground), the jobs of a shell with job control. Nor is what runs as another user, \
under sudo for example, as the system lets nobody else end it (EPERM). `tenure run` says so, and leaves the lock to \
its ttl. What the command has sent to other systems can't be called back: have them check the fencing token.";

const AFTER_RUN: &str = "\
Environment of the command:
  TENURE_KEY            the key
  TENURE_FENCING_TOKEN  a number that is greater for every holder: send it
                        along, and let the receiver refuse lower ones

Signals:
  SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to the
  command's process group. Before the command has started, the first four end
  the wait. They also reach a command that is stopped, which keeps the lock.

  If tenure itself is killed, or stopped for so long that the lock is about to
  be lost, a second process of it (`tenure __watch`) ends the group. There is
  no grace period if tenure is killed under another `tenure run`, whose lock
  may end. Where that process can't be started, the command doesn't run;
  where it is gone later and can't be replaced, tenure says so, and tries
  again.

Exit codes:
  the command's own  it has run and ended
  128 + N            the signal N has ended the command, or tenure before it
                     had started the command
  64                 the arguments are wrong
  69                 the server can't be reached, refuses, or has failed; or
                     the system doesn't let tenure start what it needs
  75                 not obtained: another has the lock (--not-obtained-code)
  76                 lost: the lock was lost while the command ran. The
                     process group was ended, unless the command had already
                     ended by itself (--lost-code)
  124                the command ran for as long as --at-most allows, and its
                     process group was ended
  126, 127           the command can't be executed; it doesn't exist

  A command may exit with any of these, too. With --json, the last line on
  stderr says which it was.";

const AFTER_STATUS: &str = "\
Exit codes:
  0   the locks were looked at
  64  the arguments are wrong
  69  the server can't be reached, refuses, or has failed
  74  the result could not be written to stdout, for example because the disk
      is full
  75  with --exit-code: one of the locks is held";

const AFTER_LIST: &str = "\
Exit codes:
  0   the locks were listed
  64  the arguments are wrong
  69  the server can't be reached, refuses, or has failed
  74  the result could not be written to stdout, for example because the disk
      is full";

const AFTER_BREAK: &str = "\
Exit codes:
  0   the lock was ended
  1   there was no lock, the answer was no, or the holder has changed since it
      was shown
  64  the arguments are wrong; without a terminal, --yes is needed
  69  the server can't be reached, refuses, or has failed: look with
      `tenure status` before you try again
  74  the result could not be written to stdout, for example because the disk
      is full: `tenure status` shows whether the lock has ended";

const AFTER_DOCTOR: &str = "\
Exit codes:
  0   nothing was found, or only what is good to know
  1   warnings: locks may be lost, or held twice, after a restart or a failover
  2   dangers: locks can't be obtained, or are lost or held twice in normal
      operation
  64  the arguments are wrong
  69  the server can't be reached, refuses, or has failed
  74  the result could not be written to stdout, for example because the disk
      is full";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_tables_of_the_manual_fit_into_eighty_columns() {
        for text in [AFTER, AFTER_RUN, AFTER_STATUS, AFTER_LIST, AFTER_BREAK, AFTER_DOCTOR] {
            let too_long: Vec<_> = text.lines().filter(|line| line.len() > 79).collect();
            assert!(too_long.is_empty(), "{too_long:?}");
        }
    }
}
