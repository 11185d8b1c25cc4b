//! What the crate reports through `tracing`. The name of each event is its target as well, as formatters show targets
//! and no names. It begins with the name of the crate, by which filters choose.

/// Reports an event at level debug.
macro_rules! at_debug {
    (name: $name:literal, $($rest:tt)+) => { tracing::debug!(name: $name, target: $name, $($rest)+) };
}

/// Reports an event at level warn.
macro_rules! at_warn {
    (name: $name:literal, $($rest:tt)+) => { tracing::warn!(name: $name, target: $name, $($rest)+) };
}

/// Reports an event at level error.
macro_rules! at_error {
    (name: $name:literal, $($rest:tt)+) => { tracing::error!(name: $name, target: $name, $($rest)+) };
}

pub(crate) use {at_debug as debug, at_error as error, at_warn as warn};
