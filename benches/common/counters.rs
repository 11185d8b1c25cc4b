//! The server's counters: its processor time, and the commands that it runs.

use redis::Connection;

/// Queries one server, on a separate connection, so that the measured work doesn't wait for it.
pub(crate) struct Observer(Connection);

impl Observer {
    pub(crate) fn connect(url: &str) -> Self {
        let client = redis::Client::open(url).expect("a URL");
        Self(client.get_connection().expect("a connection"))
    }

    /// Returns the present counters. This costs the server one command, which the next look counts.
    pub(crate) fn look(&mut self) -> Counters {
        Counters(redis::cmd("INFO").arg("everything").query(&mut self.0).expect("an answer"))
    }
}

/// The reply to `INFO everything`. It counts from the server's start, so only the difference of two matters.
pub(crate) struct Counters(String);

impl Counters {
    /// Returns the processor time in seconds, in the kernel and outside it.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let part = |name| self.field(name).and_then(|seconds| seconds.parse::<f64>().ok()).expect("a number");
        part("used_cpu_sys") + part("used_cpu_user")
    }

    /// Returns the number of all commands, including those that scripts have run.
    pub(crate) fn commands(&self) -> u64 {
        self.field("total_commands_processed").and_then(|count| count.parse().ok()).expect("a number")
    }

    /// Returns how often these commands were run, by clients or by scripts.
    pub(crate) fn calls(&self, commands: &[&str]) -> u64 {
        commands.iter().map(|command| self.calls_of(command)).sum()
    }

    fn calls_of(&self, command: &str) -> u64 {
        // The format is `cmdstat_get:calls=3,usec=…`; for a subcommand `cmdstat_script|load:…`. Missing: never called.
        let Some(figures) = self.field(&format!("cmdstat_{command}")) else { return 0 };
        let calls = figures.strip_prefix("calls=").and_then(|figures| figures.split(',').next());
        calls.and_then(|calls| calls.parse().ok()).expect("a number")
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    }
}
