//! One function per command: settings, a library call, a report.

mod answer;
mod chat;
mod compare;
mod compare_legs;
mod convert;
mod data;
mod data_show;
mod doctor;
mod eval;
mod fuse;
mod fuse_rows;
mod fuse_verify;
mod generate;
mod inspect;
mod load;
mod lora;
mod perplexity;
mod plot;
mod server;

pub(crate) use chat::chat;
pub(crate) use compare::compare;
pub(crate) use convert::convert;
pub(crate) use data_show::data_show;
pub(crate) use doctor::doctor;
pub(crate) use eval::eval;
pub(crate) use fuse::fuse;
pub(crate) use generate::generate;
pub(crate) use inspect::inspect;
pub(crate) use lora::lora;
pub(crate) use perplexity::perplexity;
pub(crate) use plot::plot;
pub(crate) use server::server;
