//! How lists and details are printed: tables, JSON, and templates in the syntax of Go's text/template, as docker has them.

pub(crate) mod indent;
pub(crate) mod listing;
pub(crate) mod table;
pub(crate) mod template;
pub(crate) mod units;

mod evaluate;
mod function;
mod parse;
mod token;
