//! Certificates with a wrong role or issuer: those of a relay, of a migration control server,
//! without a role, and of another CA.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;

use common::signal::{DirectoryMessage, PeerMessage};
use roamcast::net::tls::TlsFiles;
use roamcast::pki::{self, Validity};
use roamcast::role::Role;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{Error, RootCertStore};
use support::agent::{ADDRESS, Agent, Files, domain, issue};
use support::certificate::certify;
use support::liar::{Liar, LyingServer};
use support::netns::{Namespace, privileged, wait_for};

/// Returns an empty frame of every message kind. A receiver that decodes one reports an error.
fn messages() -> impl Iterator<Item = (u16, &'static str, Vec<u8>)> {
    let kinds = PeerMessage::KINDS.iter();
    let others = DirectoryMessage::KINDS
        .iter()
        .filter(|(kind, _)| PeerMessage::KINDS.iter().all(|(known, _)| known != kind));
    kinds.chain(others).map(|&(kind, name)| {
        let [high, low] = kind.to_be_bytes();
        (kind, name, vec![0x84, 1, 7, 0x19, high, low, 0x80])
    })
}

/// Prepares an agent's files in a namespace before the agent starts.
fn with_files(attack: impl FnOnce(&Files) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    host.run_with_bpffs(|bpffs: &Path| {
        let victim = domain("victim", 1, "tap0", [0x52, 0x54, 0, 0, 0, 7]);
        attack(&Files::new(bpffs, &[victim], ""));
    });
}

/// Sends every message, each on its own connection, with a certificate that the agent must refuse
/// for `reason` (sent to the peer if possible). Asserts that the agent then still accepts another
/// agent.
fn is_refused(agent: &Agent, own: &TlsFiles, counter: &str, reason: Option<&str>) {
    let to = SocketAddr::from(ADDRESS);
    let ca = agent.pki().join("signalling/cacert.pem");
    let good = certify(&agent.pki(), &["vms3"], &["urn:roamcast:role:agent"]);
    let count = || agent.counter(&format!("connections_{counter}"));
    let before = count();
    let verdict = Liar::attempt(to, "vms1", &ca, own).listen();
    let said = verdict.get(5..).map(String::from_utf8_lossy);
    assert_eq!(said.is_some(), reason.is_some(), "{said:?}");
    if let (Some(said), Some(reason)) = (said, reason) {
        assert_eq!(verdict[4], 1);
        assert!(said.contains(reason), "{said}");
    }
    for (tried, (_, name, frame)) in (2..).zip(messages()) {
        // The verdict may be lost, because the agent closes a connection with unread data.
        let answer = Liar::attempt(to, "vms1", &ca, own).insist(&frame);
        assert!(answer.is_empty() || answer == verdict, "{name}: {answer:?}");
        wait_for("the refusal to be counted", || {
            (count() == before + tried).then_some(())
        });
        // A success ends the delay that failures cause.
        Liar::connect(to, "vms1", &ca, &good);
    }
    assert_eq!(agent.counter("frames_malformed"), 0);
    assert_eq!(agent.counter("connections_malformed_frame"), 0);
    assert_eq!(agent.query("migrations"), Some(serde_json::json!([])));
}

#[test]
fn nobody_but_an_agent_says_anything_to_an_agent() {
    with_files(|files| {
        let agent = Agent::start_with(files, files.log_file());
        let pki = agent.pki();
        // Names that the agent accepts from agents: one from the configuration, and one of an
        // admitted agent.
        for (name, role) in [("vms2", Role::Relay), ("vms4", Role::Mcs)] {
            let own = issue(&pki, name, role);
            let reason = format!("`{name}` is of the role {role}");
            is_refused(&agent, &own, "wrong_role", Some(&reason));
        }
        let none = certify(&pki, &["vms5"], &[]);
        is_refused(&agent, &none, "no_role", Some("pki issue"));
        let [agents, relays] = [Role::Agent, Role::Relay].map(Role::uri);
        let both = certify(&pki, &["vms6"], &[&agents, &relays]);
        is_refused(&agent, &both, "no_role", Some("more than one role"));
        let upper = certify(&pki, &["vms7"], &["URN:ROAMCAST:ROLE:AGENT"]);
        is_refused(&agent, &upper, "no_role", Some("names the role \"AGENT\""));
        let other = tempfile::tempdir().unwrap();
        pki::init(other.path(), "other CA", Validity::days(1)).unwrap();
        let foreign = issue(other.path(), "vms8", Role::Agent);
        is_refused(&agent, &foreign, "bad_certificate", None);
        let log = agent.log();
        for reason in ["wrong_role", "no_role", "bad_certificate"] {
            assert!(log.contains(reason), "{reason}: {log}");
        }
    });
}

/// A server with the message that it sends to every client.
struct Lie {
    server: LyingServer,
    message: &'static str,
    frame: Vec<u8>,
}

/// Starts servers of a role, one per message in `says`. Returns them and the configuration line
/// that names them.
fn lying_servers(
    files: &Files,
    key: &str,
    role: Role,
    says: impl Fn(u16) -> bool,
) -> (Vec<Lie>, String) {
    let mut rows = Vec::new();
    let servers = messages()
        .filter(|(kind, _, _)| says(*kind))
        .map(|(kind, message, frame)| {
            let name = format!("{role}{kind}");
            let server = LyingServer::new(&issue(&files.pki(), &name, role));
            let address = server.address();
            rows.push(format!("{{ name = \"{name}\", address = \"{address}\" }}"));
            Lie {
                server,
                message,
                frame,
            }
        })
        .collect();
    (servers, format!("{key} = [{}]\n", rows.join(", ")))
}

#[test]
fn relay_or_server_that_is_dialed_says_nothing_that_is_not_for_its_role() {
    with_files(|files| {
        // Messages of their own role: RelayResponse, RelayRelease; Registered, RelaySearchReply;
        // Error.
        let relays = lying_servers(files, "servers", Role::Relay, |kind| {
            ![8, 13, 14].contains(&kind)
        });
        let servers = lying_servers(files, "mcs", Role::Mcs, |kind| {
            ![14, 16, 18].contains(&kind)
        });
        files.configure(&format!("[relay]\n{}{}", relays.1, servers.1));
        let agent = Agent::start_with(files, files.log_file());
        let liars: Vec<_> = relays.0.iter().chain(&servers.0).collect();
        thread::scope(|scope| {
            for lie in &liars {
                scope.spawn(move || {
                    let answer = lie.server.serve(&lie.frame);
                    // An agent registers with a server on its own, and answers no message.
                    let registers = answer.len() > 8 && answer[4..8] == [0x84, 1, 0, 15];
                    let message = lie.message;
                    assert!(answer.is_empty() || registers, "{message}: {answer:?}");
                });
            }
        });
        let expected = u64::try_from(liars.len()).unwrap();
        assert_eq!(expected, 26);
        wait_for("all to be refused", || {
            (agent.counter("connections_forbidden_message") >= expected).then_some(())
        });
        assert_eq!(agent.counter("frames_malformed"), 0);
        assert_eq!(agent.query("migrations"), Some(serde_json::json!([])));
        let log = agent.log();
        for lie in liars {
            assert!(log.contains(lie.message), "{}: {log}", lie.message);
        }
    });
}

/// Serves everybody a session description that declares a relay. Returns its URL.
fn describe(name: &str, address: SocketAddr) -> String {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let url = format!("http://{}/tv.sdp", listener.local_addr().unwrap());
    let text = format!("v=0\r\na=x-roamcast-relay:{name} {address}\r\n");
    let answer = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{text}");
    thread::spawn(move || {
        for stream in listener.incoming().take(1000).flatten() {
            let mut request = BufReader::new(&stream).lines().map_while(Result::ok);
            if request.any(|line| line.is_empty()) {
                let _ = (&stream).write_all(answer.as_bytes());
            }
        }
    });
    url
}

#[test]
fn agent_does_not_talk_to_a_relay_or_server_whose_certificate_is_of_another_role() {
    with_files(|files| {
        let pki = files.pki();
        let of_role = |name, role| LyingServer::new(&issue(&pki, name, role));
        let liars = [
            ("relay1", of_role("relay1", Role::Agent)),
            ("relay2", of_role("relay2", Role::Mcs)),
            ("relay3", LyingServer::new(&certify(&pki, &["relay3"], &[]))),
            ("mcs1", of_role("mcs1", Role::Relay)),
            ("vms4", of_role("vms4", Role::Relay)),
            ("vms5", of_role("vms5", Role::Agent)),
        ];
        let row = |index: usize| {
            let (name, liar): &(&str, LyingServer) = &liars[index];
            format!("{{ name = \"{name}\", address = \"{}\" }}", liar.address())
        };
        files.configure(&format!(
            "[relay]\nservers = [{}, {}, {}]\nmcs = [{}]\nsdp = \"{}\"\n\
             [[peers]]\nname = \"vms4\"\naddress = \"{}\"\n\
             [[policy.depart]]\ndomains = [\"*\"]\ndestinations = [\"*\"]\n",
            row(0),
            row(1),
            row(2),
            row(3),
            describe("vms5", liars[5].1.address()),
            liars[4].1.address()
        ));
        let agent = Agent::start_with(files, files.log_file());
        wait_for("libvirt", || {
            (agent.status()?["hypervisor"]["state"] == "up").then_some(())
        });
        thread::scope(|scope| {
            for (name, liar) in &liars {
                scope.spawn(move || {
                    let answer = liar.serve(&messages().next().unwrap().2);
                    assert!(answer.is_empty(), "{name}: {answer:?}");
                });
            }
            let mut migrate = agent.command(&["migrate", "victim", "vms4"]);
            let output = migrate.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                said.contains("its certificate is of the role relay"),
                "{said}"
            );
        });
        wait_for("all to be refused", || {
            let wrong = agent.counter("connections_wrong_role");
            (wrong >= 5 && agent.counter("connections_no_role") >= 1).then_some(())
        });
        assert_eq!(agent.counter("connections_dialed"), 0);
        let relays = agent.query("relays").unwrap().to_string();
        assert!(relays.contains("is of the role agent"), "{relays}");
        assert!(relays.contains("names no role"), "{relays}");
    });
}

#[test]
fn agent_with_a_certificate_of_the_version_before_says_what_to_do() {
    with_files(|files| {
        let old = certify(&files.pki(), &["vms1"], &[]);
        let own = files.pki().join("vms1/roamcast");
        fs::copy(&old.certificate, own.join("cert.pem")).unwrap();
        fs::copy(&old.key, own.join("private/key.pem")).unwrap();
        let mut agent = files.spawn(Stdio::piped());
        let status = wait_for("the agent to end", || agent.child.try_wait().unwrap());
        assert!(!status.success());
        let mut stderr = agent.child.stderr.take().unwrap();
        let said = std::io::read_to_string(&mut stderr).unwrap();
        let command = "roamcast pki issue DIRECTORY vms1 --role agent";
        assert!(
            said.contains("names no role") && said.contains(command),
            "{said}"
        );
    });
}

#[test]
fn relay_has_no_certificate_that_libvirt_takes() {
    let directory = tempfile::tempdir().unwrap();
    let pki = directory.path();
    let authorities = pki::init(pki, "test CA", Validity::days(1)).unwrap();
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(&authorities.libvirt.certificate).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(ring::default_provider());
    let libvirt = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .unwrap();
    let takes = |certificate: &Path| -> Result<(), Error> {
        let certificate = CertificateDer::from_pem_file(certificate).unwrap();
        libvirt
            .verify_client_cert(&certificate, &[], UnixTime::now())
            .map(drop)
    };
    for (name, role) in [("relay1", Role::Relay), ("mcs1", Role::Mcs)] {
        let own = issue(pki, name, role);
        takes(&own.certificate).unwrap_err();
        let inside: Vec<_> = fs::read_dir(pki.join(name)).unwrap().collect();
        assert_eq!(inside.len(), 1, "more than the signalling's: {inside:?}");
    }
    let host = issue(pki, "vms1", Role::Agent);
    takes(&host.certificate).unwrap_err();
    takes(&pki.join("vms1/libvirt/clientcert.pem")).unwrap();
}
