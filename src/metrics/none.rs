//! The items of `record.rs`, for when the feature `metrics` is off: they do nothing, and have no size.

use std::time::Duration;

use crate::{Error, Key, Loss};

#[derive(Clone, Debug, Default)]
pub(crate) struct Labels {}

#[derive(Clone, Default)]
pub(crate) struct Label {}

pub(crate) struct Waiting;

impl Waiting {
    pub(crate) fn begin(_: &Labels, _: &[Key]) -> Self {
        Self
    }

    pub(crate) fn end<T>(self, _: &Result<T, Error>) {}
}

#[derive(Default)]
pub(crate) struct Held {}

impl Held {
    pub(crate) fn begin(_: &Labels, _: &[Key]) -> Self {
        Self {}
    }

    pub(crate) fn label(&self) -> Label {
        Label {}
    }

    pub(crate) fn end(self, _: Loss) {}
}

pub(crate) fn lost(_: &Label, _: Loss) {}

pub(crate) fn renewed(_: &Label, _took: Duration, _left: Duration) {}

pub(crate) fn renewal_failed(_: &Label) {}

pub(crate) fn called(_operations: usize) {}
