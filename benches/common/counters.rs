//! What the server counts: its own time, and the commands that it runs.

use redis::Connection;

/// Asks one server. On a connection of its own, so that what is measured doesn't wait for it.
pub(crate) struct Observer(Connection);

impl Observer {
    pub(crate) fn connect(url: &str) -> Self {
        let client = redis::Client::open(url).expect("a URL");
        Self(client.get_connection().expect("a connection"))
    }

    /// As of now. Costs the server one command, which counts with the next look.
    pub(crate) fn look(&mut self) -> Counters {
        Counters(redis::cmd("INFO").arg("everything").query(&mut self.0).expect("an answer"))
    }
}

/// The answer to `INFO everything`. Counted since the server's start: what matters is the difference of two.
pub(crate) struct Counters(String);

impl Counters {
    /// Processor time in seconds, in the kernel and out of it.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        let part = |name| self.field(name).and_then(|seconds| seconds.parse::<f64>().ok()).expect("a number");
        part("used_cpu_sys") + part("used_cpu_user")
    }

    /// All commands, those that scripts have run too.
    pub(crate) fn commands(&self) -> u64 {
        self.field("total_commands_processed").and_then(|count| count.parse().ok()).expect("a number")
    }

    /// How often these commands were run, whether by clients or by scripts.
    pub(crate) fn calls(&self, commands: &[&str]) -> u64 {
        commands.iter().map(|command| self.calls_of(command)).sum()
    }

    fn calls_of(&self, command: &str) -> u64 {
        // As `cmdstat_get:calls=3,usec=…`; a subcommand's is `cmdstat_script|load:…`. None: never called.
        let Some(figures) = self.field(&format!("cmdstat_{command}")) else { return 0 };
        let calls = figures.strip_prefix("calls=").and_then(|figures| figures.split(',').next());
        calls.and_then(|calls| calls.parse().ok()).expect("a number")
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    }
}
