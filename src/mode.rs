//! Who may hold a key together.

/// Who else may hold a key while a guard does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) enum Mode {
    /// Nobody.
    #[default]
    Exclusive,
    /// Other readers.
    Read,
    /// Others with a permit, as many as the limit of a request allows.
    Permit,
}

impl Mode {
    /// Returns whether others may hold the key, too.
    pub(crate) fn is_shared(self) -> bool {
        self != Self::Exclusive
    }
}

/// Why a store without readers refuses them.
pub(crate) const NO_READERS: &str = "this store has no readers";

#[cfg(test)]
mod tests;
