use std::io::{BufRead, BufReader, Cursor};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use proptest::prelude::*;

use super::*;

/// Longer than any step here takes, and shorter than a test may take.
const BOUND: Duration = Duration::from_secs(60);

const XML: &str = "<domain><name>viewer</name>
    <uuid>07070707-0707-0707-0707-070707070707</uuid>
    <metadata><r:agent xmlns:r='urn:roamcast:agent:1' name='vms1'/></metadata></domain>";

fn arguments(line: &str) -> Vec<OsString> {
    line.split(' ').map(OsString::from).collect()
}

fn nobody() -> PathBuf {
    PathBuf::from("/nonexistent/agent.sock")
}

/// Starts an agent that answers with these lines. Returns its socket and the requests that it gets.
fn agent(directory: &Path, answer: &'static str) -> (PathBuf, mpsc::Receiver<String>) {
    let path = directory.join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, asked) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        sender.send(line).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        // The connection stays open until the hook closes it.
        let _ = stream.read(&mut [0]);
    });
    (path, asked)
}

#[test]
fn only_the_beginning_of_an_incoming_migration_concerns_the_hook() {
    assert!(concerns(&arguments("viewer migrate begin -")));
    assert!(concerns(&arguments("viewer migrate begin")));
    for line in [
        "",
        "viewer",
        "viewer migrate",
        "viewer migrate end -",
        "viewer prepare begin -",
        "migrate begin - -",
    ] {
        assert!(!concerns(&arguments(line)), "{line}");
    }
}

#[test]
fn agent_is_asked_for_the_domain_and_its_source() {
    let directory = tempfile::tempdir().unwrap();
    let answer = "{\"reply\":\"done\",\"data\":{\"migration\":7}}\n{\"reply\":\"end\"}\n";
    let (socket, asked) = agent(directory.path(), answer);
    run(Cursor::new(XML), socket, BOUND).unwrap();
    assert_eq!(
        asked.recv().unwrap(),
        "{\"request\":\"prepare\",\"domain_uuid\":\"07070707-0707-0707-0707-070707070707\",\
         \"domain_name\":\"viewer\",\"source\":\"vms1\"}\n"
    );
}

#[test]
fn refusal_of_the_agent_is_passed_on_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let answer = "{\"reply\":\"error\",\"data\":\"Source vms1 is down\"}\n";
    let (socket, _asked) = agent(directory.path(), answer);
    let error = run(Cursor::new(XML), socket, BOUND).unwrap_err();
    assert_eq!(error.to_string(), "Source vms1 is down");
}

#[test]
fn agent_that_stays_silent_is_left_at_the_bound() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, asked) = agent(directory.path(), "");
    let bound = Duration::from_millis(300);
    let started = Instant::now();
    let error = run(Cursor::new(XML), socket, bound).unwrap_err();
    assert!(matches!(error, HookError::Late(_)), "{error}");
    assert!((bound..BOUND).contains(&started.elapsed()));
    asked.recv().unwrap();
}

#[test]
fn input_that_never_ends_is_left_at_the_bound_or_at_its_size() {
    struct Stuck;
    impl Read for Stuck {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            loop {
                thread::park();
            }
        }
    }
    let error = run(Stuck, nobody(), Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, HookError::Late(_)), "{error}");
    let error = run(io::repeat(b'<'), nobody(), BOUND).unwrap_err();
    assert!(matches!(error, HookError::TooLong), "{error}");
}

#[test]
fn no_agent_here_or_at_the_source_is_one_sentence() {
    let error = run(Cursor::new(XML), nobody(), BOUND).unwrap_err();
    assert!(error.to_string().starts_with("No agent listens"), "{error}");
    let xml = XML.replace("vms1", "");
    let error = run(Cursor::new(xml), nobody(), BOUND).unwrap_err();
    assert!(matches!(error, HookError::NoAgent { .. }), "{error}");
}

proptest! {
    #[test]
    fn any_input_ends_in_an_error_and_no_panic(bytes: Vec<u8>) {
        prop_assert!(run(Cursor::new(bytes), nobody(), BOUND).is_err());
    }

    #[test]
    fn damaged_xml_ends_in_an_error_and_no_panic(at in 0..XML.len(), byte: u8) {
        let mut xml = XML.as_bytes().to_vec();
        xml[at] = byte;
        prop_assert!(run(Cursor::new(xml), nobody(), BOUND).is_err());
    }
}
