//! Guides.

pub mod migrating_from_go;
