//! An enrolled node registers another node's address first, so that nobody finds that node.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use common::mat::message::{Moa, UpdateRequest};
use lab::binaries;
use serde_json::Value;
use support::ims::{Files, Node, Server, hoa, own_directories, update_request};
use support::netns::{Namespace, privileged, wait_for};

const PORT: u16 = 47413;
/// Address from the network that the victim is in.
const GIVEN: &str = "2001:db8:1::2/64";

/// `migkick node`, killed on drop.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Victim {
    fn start(key: &Path) -> Self {
        let mut command = Command::new(binaries::path("migkick").unwrap());
        Self(command.args(["node", "--config"]).arg(key).spawn().unwrap())
    }
}

/// Returns the victim's MoA once the server knows the victim there.
fn registered(files: &Files) -> Ipv6Addr {
    wait_for("the registration", || {
        let rows = files.list();
        let row = rows.iter().find(|row| row["hoa"] == hoa(1).to_string())?;
        let moas = row["moas"].as_array()?;
        // The assigned address is registered first, until the neutral one is usable.
        let neutral = |it: &Value| -> Option<Ipv6Addr> {
            let address: Ipv6Addr = it["address"].as_str()?.parse().ok()?;
            (it["priority"] == 1 && address.segments()[4..] != [0, 0, 0, 2]).then_some(address)
        };
        moas.iter().find_map(neutral)
    })
}

/// Registers the address as the victim would, with another identity.
fn squat(squatter: &mut Node, address: Ipv6Addr) {
    let request = UpdateRequest {
        moas: vec![Moa {
            address: address.octets().into(),
            priority: 1,
        }],
        ..update_request(2, 1, 600)
    };
    let patience = Duration::from_secs(10);
    squatter.ask(&request.into(), patience).unwrap();
}

#[test]
fn node_whose_address_somebody_has_registered_takes_another_one() {
    if !privileged() {
        return;
    }
    if !migkick::datapath::has_tcx() {
        println!("skipped: this kernel has no TCX, which nodes need");
        return;
    }
    let (network, other) = (Namespace::new("node"), Namespace::new("other"));
    let peer = other.name();
    network.ip(&format!(
        "link add eth0 type veth peer name eth0 netns {peer}"
    ));
    network.ip("link set eth0 up");
    other.ip("link set eth0 up");
    network.ip(&format!("addr add {GIVEN} dev eth0 nodad"));
    let directory = tempfile::tempdir().unwrap();
    network.run(|| {
        let files = Files::new(directory.path(), PORT, "");
        let key = directory.path().join("node.toml");
        let enrolled = files.run(&[
            "enroll",
            &hoa(1).to_string(),
            "--servers",
            &format!("[2001:db8:1::2]:{PORT}"),
            "--output",
            &key.display().to_string(),
        ]);
        assert!(enrolled.status.success(), "{enrolled:?}");
        let state = directory.path().join("node.json");
        let text = fs::read_to_string(&key).unwrap();
        fs::write(&key, format!("{text}state = {state:?}\n")).unwrap();
        let serve = || {
            let server = Server::spawn(&files);
            wait_for("the server", || files.status());
            server
        };
        let server = serve();
        own_directories();
        let victim = Victim::start(&key);
        let first = registered(&files);
        drop(victim);
        // The server loses its state, and the attacker is faster after the restart.
        drop(server);
        fs::remove_dir_all(files.path("store")).unwrap();
        let _server = serve();
        squat(&mut Node::new(2, 1, PORT), first);
        let _victim = Victim::start(&key);
        let second = registered(&files);
        assert_ne!(second, first);
    });
}
