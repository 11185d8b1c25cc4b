//! What endangers locks on a server, as [`Locker::diagnose`](crate::Locker::diagnose) finds it.

use std::fmt;
use std::time::Duration;

/// What was found on the servers behind a locker.
///
/// Its [`Display`](fmt::Display) is a report for people; with the feature `serde`, it can be serialized.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tenure::Error> {
/// use tenure::Severity;
///
/// let diagnosis = tenure::Locker::in_memory().diagnose().await?;
/// println!("{diagnosis}");
/// assert!(diagnosis.worst() < Some(Severity::Danger), "locks are not safe here");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Diagnosis {
    /// The servers that were asked: one, the primaries of a cluster, or the nodes of a quorum; none for the embedded
    /// store.
    pub servers: Vec<ServerReport>,
    /// What was found, the worst first.
    pub findings: Vec<Finding>,
}

/// What a server has reported about itself. See [`Diagnosis`] for an example.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ServerReport {
    /// Its address: `host:port`, the path of its socket, or what its Sentinels call it.
    pub address: String,
    /// Product and version, such as `Redis 7.0.15`. `None` if it didn't tell.
    pub version: Option<String>,
    /// How long it took to reply.
    pub round_trip: Duration,
    /// By how many milliseconds its clock is ahead of ours, if that is more than could be due to the
    /// [round trip](Self::round_trip); below zero if it is behind.
    pub clock_ahead_ms: Option<i64>,
}

/// Something that endangers locks, or that an operator should know. See [`Diagnosis`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub topic: Topic,
    /// The address of the server, if it concerns one of several.
    pub server: Option<String>,
    /// What was found, and what it does to locks.
    pub what: String,
    /// What to do about it.
    pub advice: String,
}

/// How much something endangers locks. Later ones are worse. See [`Diagnosis`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Severity {
    /// Good to know.
    Note,
    /// Locks may be lost, or held twice, in an event that has to be expected: a restart, a failover.
    Warning,
    /// Locks can't be obtained, or are lost or held twice in normal operation.
    Danger,
}

/// What a [`Finding`] is about. See [`Diagnosis`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Topic {
    /// Whether the server could be asked at all.
    Reachability,
    /// Keys that the server deletes when it is short of memory, and the memory that is left.
    Memory,
    /// What a restart forgets.
    Persistence,
    /// What a failover forgets.
    Replication,
    /// The server's clock.
    Clock,
    /// The server's version.
    Version,
    /// What the user may do.
    Permissions,
    /// The state of the cluster, or that there is one.
    Cluster,
}

impl Diagnosis {
    /// Returns the severity of the worst finding; `None` if there is none.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tenure::Error> {
    /// assert_eq!(tenure::Locker::in_memory().diagnose().await?.worst(), None);
    /// # Ok(())
    /// # }
    /// ```
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    /// Adds what was found elsewhere. Puts the worst first.
    pub(crate) fn extend(&mut self, other: Self) {
        self.servers.extend(other.servers);
        self.findings.extend(other.findings);
        self.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    }
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Danger => "danger",
        }
    }
}

impl Topic {
    fn name(self) -> &'static str {
        match self {
            Self::Reachability => "reachability",
            Self::Memory => "memory",
            Self::Persistence => "persistence",
            Self::Replication => "replication",
            Self::Clock => "clock",
            Self::Version => "version",
            Self::Permissions => "permissions",
            Self::Cluster => "cluster",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for ServerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = self.version.as_deref().unwrap_or("unknown version");
        write!(f, "{}: {version}, replies in {:.1?}", self.address, self.round_trip)?;
        match self.clock_ahead_ms {
            None => Ok(()),
            Some(ahead @ 0..) => write!(f, ", clock {ahead} ms ahead of ours"),
            Some(behind) => write!(f, ", clock {} ms behind ours", behind.unsigned_abs()),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.severity, self.topic)?;
        if let Some(server) = &self.server {
            write!(f, " {server}")?;
        }
        write!(f, ": {}\n    {}", self.what, self.advice)
    }
}

impl fmt::Display for Diagnosis {
    /// Writes a line for each server, and two for each finding. There is no newline at the end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.servers.iter().try_for_each(|server| writeln!(f, "{server}"))?;
        let Some((last, findings)) = self.findings.split_last() else {
            return f.write_str("nothing was found that endangers locks");
        };
        findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))?;
        write!(f, "{last}")
    }
}

#[cfg(feature = "serde")]
mod as_data {
    use serde::ser::SerializeStruct;
    use serde::{Serialize, Serializer};

    use super::{Diagnosis, Finding, ServerReport, Severity, Topic};

    impl Serialize for Diagnosis {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("Diagnosis", 2)?;
            fields.serialize_field("servers", &self.servers)?;
            fields.serialize_field("findings", &self.findings)?;
            fields.end()
        }
    }

    impl Serialize for ServerReport {
        /// The round trip is in milliseconds.
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("ServerReport", 4)?;
            fields.serialize_field("address", &self.address)?;
            fields.serialize_field("version", &self.version)?;
            fields.serialize_field("round_trip_ms", &(self.round_trip.as_secs_f64() * 1e3))?;
            fields.serialize_field("clock_ahead_ms", &self.clock_ahead_ms)?;
            fields.end()
        }
    }

    impl Serialize for Finding {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("Finding", 5)?;
            fields.serialize_field("severity", &self.severity)?;
            fields.serialize_field("topic", &self.topic)?;
            fields.serialize_field("server", &self.server)?;
            fields.serialize_field("what", &self.what)?;
            fields.serialize_field("advice", &self.advice)?;
            fields.end()
        }
    }

    impl Serialize for Severity {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str(self.name())
        }
    }

    impl Serialize for Topic {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str(self.name())
        }
    }
}
