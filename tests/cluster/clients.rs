//! Clients in other languages: Python's grpcio from our .proto files, and grpcurl by reflection.

use std::process::Command;

use crate::harness::{Cluster, PROMPTED, machine, repository};

#[test]
fn python_and_grpcurl_stream_an_answer() {
    let _machine = machine();
    let cluster = Cluster::up(&PROMPTED);
    let script = repository().join("tests/clients/run.sh");
    let endpoint = format!("http://{}", cluster.router.address);
    let output = Command::new("sh").arg(script).arg(endpoint).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
