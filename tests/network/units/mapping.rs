//! The mapping server under the restrictions of its unit, and a node that registers there.

use std::fs;
use std::path::Path;
use std::process::Command;

use lab::binaries;
use serde_json::Value;
use support::ims::{Files, Node, hoa, own_directories};
use support::netns::Namespace;

use super::systemd::{Service, Systemd, give, load_credentials, possible, take_keys};

const PORT: u16 = 47413;
const SERVER: &str = "2001:db8:1::1";
const NODE: &str = "2001:db8:1::2";

/// Returns two connected namespaces: one for the server and one for a node.
fn network() -> (Namespace, Namespace) {
    let (server, node) = (Namespace::new("server"), Namespace::new("node"));
    let peer = node.name();
    server.ip(&format!(
        "link add up0 type veth peer name eth0 netns {peer}"
    ));
    server.ip("link set up0 up");
    node.ip("link set eth0 up");
    server.ip(&format!("addr add {SERVER}/64 dev up0 nodad"));
    node.ip(&format!("addr add {NODE}/64 dev eth0 nodad"));
    (server, node)
}

/// Returns the output of `migkick node status`, or `None` if there is none.
fn node_status() -> Option<Value> {
    let mut command = Command::new(binaries::path("migkick").unwrap());
    let output = command.args(["node", "status", "--json"]).output().unwrap();
    serde_json::from_slice(&output.stdout).ok()
}

#[test]
fn mapping_server_enrolls_and_serves_and_a_node_registers() {
    if !possible() {
        return;
    }
    let (server_side, node_side) = network();
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    // The operator's configuration names the secret; the service receives the secret from systemd.
    let files = Files::new(directory, PORT, "");
    let config = directory.join("server.toml");
    fs::copy(files.path("ims.toml"), &config).unwrap();
    let [secret] = take_keys(&config, ["secret"]);
    let credentials = load_credentials(directory, &[("ims.secret", &secret)]);
    let store = files.path("store");
    give(&store);
    give(directory);
    // This directory belongs to root, as /etc/migkick and /var/lib/migkick do.
    let own = tempfile::tempdir().unwrap();
    let key = own.path().join("node.toml");
    let enroll = |number: u32| {
        let (hoa, server) = (hoa(number).to_string(), format!("[{SERVER}]:{PORT}"));
        let output = files.run(&[
            "enroll",
            &hoa,
            "--servers",
            &server,
            "--output",
            &key.with_extension(number.to_string()).display().to_string(),
        ]);
        assert!(output.status.success(), "{output:?}");
    };
    // Root creates the store before the first start of the server.
    server_side.run(|| enroll(1));

    let mut systemd = Systemd::new("roamcast-ims", directory);
    let mut service = server_side.run(|| {
        let mut command = systemd.command(&[directory], "roamcast");
        command.args(["ims", "--config"]).arg(&config);
        command.env("CREDENTIALS_DIRECTORY", &credentials);
        Service::start(command)
    });
    service.wait("the server", || files.status());
    server_side.run(|| {
        enroll(2);
        let mut node = Node::new(2, 1, PORT);
        assert_eq!(node.update(1).outcome, 0);
        assert_eq!(node.lookup(2).mapping.unwrap().sequence, 1);
    });
    systemd.wait();

    if !migkick::datapath::has_tcx() {
        println!("no node: this kernel has no TCX, which nodes need");
        return;
    }
    let key = key.with_extension("1");
    let state = own.path().to_owned();
    let text = fs::read_to_string(&key).unwrap();
    fs::write(
        &key,
        format!("{text}state = {:?}\n", state.join("node.json")),
    )
    .unwrap();
    node_side.run(|| {
        own_directories();
        let mut systemd = Systemd::new("migkick-node", &state);
        let writable = [Path::new("/run/migkick"), &state];
        let mut command = systemd.command(&writable, "migkick");
        command.args(["node", "--config"]).arg(&key);
        let mut node = Service::start(command);
        node.wait("the node", node_status);
        node.wait("the registration", || {
            let rows = files.list();
            let row = rows.iter().find(|row| row["hoa"] == hoa(1).to_string())?;
            (!row["moas"].as_array()?.is_empty()).then_some(())
        });
        systemd.wait();
        assert!(state.join("node.json").exists());
    });
}
