//! A VM reports more listeners than permitted, in Reports too long for the kernel program.

use common::testing::frame::{Frame, MAC, record};
use serde_json::Value;
use support::agent::{Agent, domain};
use support::netns::{privileged, wait_for};
use support::tap::Guest;
use support::wire::Wire;

use super::{Namespace, group, has, mdb};

/// Records per Report: more than the kernel program reads, and as many as fit into a page.
const RECORDS: usize = 200;
const LIMITS: &str = "[limits]\nlisteners = 20\nsources = 10\n";

/// Returns the numbers of the first `groups` groups that are in the bridge's MDB.
fn in_bridge(host: &Namespace, groups: usize) -> Vec<usize> {
    let mdb = mdb(host);
    (0..groups).filter(|number| has(&mdb, *number)).collect()
}

fn listeners(agent: &Agent) -> usize {
    let rows = agent.query("listeners");
    let rows = rows.as_ref().and_then(Value::as_array);
    rows.map_or(0, Vec::len)
}

#[test]
fn bridge_keeps_nothing_of_a_long_report_that_the_vm_may_not_say() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "tap0", 0);
    guest.namespace.ip("link set eth0 mtu 9000");
    host.ip("link set tap0 mtu 9000");
    host.ip("link set br0 mtu 9000");
    let inner = guest.namespace.ifindex("eth0");
    let wire = guest.namespace.run(|| Wire::new(inner));
    host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[domain("vm", 1, "tap0", MAC)], LIMITS);
        let records: Vec<_> = (0..RECORDS)
            .map(|number| record(4, &group(number), &[]))
            .collect();
        wire.send(&Frame::report(&records).bytes());
        wait_for("the Report", || {
            (agent.counter("unfinished") > 0 && listeners(&agent) > 0).then_some(())
        });
        wait_for("the bridge to have what the maps have", || {
            let known = in_bridge(&host, RECORDS);
            (known.len() == listeners(&agent) && known.len() <= 20).then_some(())
        });

        // The permitted groups stay, and the VM may still change them.
        let kept = in_bridge(&host, RECORDS);
        assert!(!kept.is_empty());
        let sources: Vec<String> = (1..200).map(|n| format!("2001:db8::{n:x}")).collect();
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        wire.send(&Frame::report(&[record(3, &group(kept[0]), &sources)]).bytes());
        wait_for("no more sources in the bridge than may be", || {
            let shown = mdb(&host);
            let line = format!("grp {} src ", group(kept[0]));
            let listed = shown.lines().filter(|it| it.contains(&line)).count();
            ((1..=10).contains(&listed) && agent.counter("refused_sources") > 0).then_some(())
        });
    });
}
