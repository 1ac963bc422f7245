//! The core by examples: what is done about an event in a phase. All interleavings are walked in
//! `dormouse-lifecycle-model`.

mod adopting;
mod checking;
mod desk;
mod ending;
mod idling;
mod showing;
mod sleeping;
mod starting;
