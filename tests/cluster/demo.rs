//! The demo as a stranger runs it.

use std::process::Command;

use crate::harness::{demo_model, machine};

#[test]
fn the_demo_shows_four_answers_side_by_side_and_stops_cleanly() {
    let _machine = machine();
    let output = Command::new(env!("CARGO_BIN_EXE_uniarm"))
        .args(["demo", "--max-tokens", "12", "--model", demo_model()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for expected in ["unguided", "positive 100 %", "concise 100 %", "bytes of reward logits", "have stopped"]
    {
        assert!(said.contains(expected), "{expected:?} is missing in:\n{said}");
    }
}
