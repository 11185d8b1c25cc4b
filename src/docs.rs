//! Guides.

pub mod guarantees;
pub mod migrating_from_go;
