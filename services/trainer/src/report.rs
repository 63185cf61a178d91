//! What an evaluation found, as pictures, a page and a file for programs.

pub mod chart;
