//! Guides.

pub mod migrating_from_go;
pub mod readers_and_permits;
