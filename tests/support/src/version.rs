//! Which server the tests run on: the binary that the environment names, and the version it is of.

use std::ffi::OsString;
use std::fmt;
use std::process::Command;
use std::sync::OnceLock;

/// The server's name and its version, such as `redis 7.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// `redis` or `valkey`.
    pub product: String,
    /// Major and minor number.
    pub number: (u32, u32),
}

impl Version {
    /// Returns the version of the binary that `TENURE_SERVER` names, or of `redis-server`: all servers are of it.
    /// Where `TENURE_SERVER_VERSION` is set, it must be that, so that no run is taken for one on another server.
    ///
    /// # Panics
    ///
    /// When there is no such binary, or it is of another version.
    pub fn of_this_run() -> &'static Self {
        static VERSION: OnceLock<Version> = OnceLock::new();
        VERSION.get_or_init(|| {
            let output = Command::new(binary()).arg("--version").output();
            let output = output.expect("a server; `bash tests/run.sh` installs redis-server");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let version = Self::parse(&said).unwrap_or_else(|| panic!("no version: {said}"));
            if let Some(expected) = Self::expected() {
                assert_eq!(version.to_string(), expected, "this run is for another server");
            }
            version
        })
    }

    /// What `TENURE_SERVER_VERSION` says.
    pub fn expected() -> Option<String> {
        std::env::var("TENURE_SERVER_VERSION").ok()
    }

    /// Whether Redis' commands and options of this version are known. Valkey begins with those of Redis 7.2.
    pub fn has_redis(&self, major: u32, minor: u32) -> bool {
        let number = if self.product == "valkey" { (7, 2).max(self.number) } else { self.number };
        number >= (major, minor)
    }

    /// `Redis server v=7.0.15 sha=…`
    fn parse(said: &str) -> Option<Self> {
        let product = said.split_whitespace().next()?.to_lowercase();
        let number = said.split_whitespace().find_map(|word| word.strip_prefix("v="))?;
        let mut parts = number.split('.').map(str::parse);
        let (Some(Ok(major)), Some(Ok(minor))) = (parts.next(), parts.next()) else { return None };
        Some(Self { product, number: (major, minor) })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{}", self.product, self.number.0, self.number.1)
    }
}

pub(crate) fn binary() -> OsString {
    std::env::var_os("TENURE_SERVER").unwrap_or_else(|| "redis-server".into())
}
