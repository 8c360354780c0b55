//! One function per command: settings, a library call, a report.

mod doctor;

pub(crate) use doctor::doctor;
