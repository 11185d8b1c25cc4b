//! What the crate reports while its tests run: with `TENURE_LOG`, all of it is appended to the file of that name, to be
//! searched for what nobody should see there.

use std::env;
use std::fs::File;
use std::sync::{Mutex, Once};

use tracing_subscriber::filter::LevelFilter;

/// Begins, if this is asked for. Done by whatever starts a server first.
pub(crate) fn begin() {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        let Some(path) = env::var_os("TENURE_LOG") else { return };
        let file = File::options().create(true).append(true).open(path).expect("a file for TENURE_LOG");
        let subscriber = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_ansi(false);
        subscriber.with_writer(Mutex::new(file)).init();
    });
}
