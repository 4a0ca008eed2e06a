//! Others remove the agent's hooks, or occupy their places, while the agent runs.

use roamcast::datapath::{Datapath, DatapathError, Hook, Program};
use roamcast::runtime::agent::hooks::{Role, State};
use support::bridged::Bridged;
use support::host::{LIMITS, has_tcx, tc_hooks};
use support::limits::Limits;
use support::netns::{Namespace, command, privileged};
use support::tap;
use support::tended::Tended;

use super::{assert_both_work, config};

fn limits(setup: &Bridged) -> Limits<'_> {
    Limits {
        namespace: &setup.host,
        tap: "vnet0",
    }
}

#[test]
fn qdisc_or_filter_that_somebody_deletes_is_made_again() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let mut agent = Tended::start(&config(bpffs, Hook::Filter));
        agent.add(Role::Tap, "vnet0", true);
        agent.until_attached();
        for (number, (deleted, lost)) in (1..).zip([
            ("qdisc del dev TAP root", Program::Gate),
            ("qdisc del dev TAP ingress", Program::Snoop),
            ("filter del dev TAP ingress", Program::Snoop),
            ("filter del dev TAP parent 7263:", Program::Gate),
        ]) {
            limits(&setup).must(deleted);
            let view = agent.views(setup.ifindex).remove(&lost).unwrap();
            assert!(
                !view.is_there,
                "status tells before it is mended: {deleted}"
            );
            agent.catch_up();
            agent.until_attached();
            assert!(
                agent
                    .views(setup.ifindex)
                    .values()
                    .all(|view| view.is_there)
            );
            assert_both_work(&setup, &agent.datapath, number);
            let [(_, counted), ..] = agent.hooks.counters();
            assert_eq!(counted, u64::from(number));
        }
    });
}

#[test]
fn link_that_somebody_detaches_is_made_again() {
    if !privileged() || !has_tcx() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let config = config(bpffs, Hook::Tcx);
        let mut agent = Tended::start(&config);
        assert!(agent.add(Role::Tap, "vnet0", false), "TCX never waits");
        let pin = support::host::pins(&config).join(format!("links/gate-{}", setup.ifindex));
        command(
            "bpftool",
            &["link", "detach", "pinned", pin.to_str().unwrap()],
        );
        assert!(!agent.views(setup.ifindex)[&Program::Gate].is_there);
        agent.survey();
        agent.until("the loss", |agent| agent.hooks.counters()[0].1 == 1);
        agent.until_attached();
        assert!(agent.views(setup.ifindex)[&Program::Gate].is_there);
        assert_both_work(&setup, &agent.datapath, 1);
    });
}

#[test]
fn tap_without_a_place_for_the_gate_is_refused_as_a_whole_until_there_is_one() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let limits = limits(&setup);
    limits.must("qdisc add dev TAP root handle 5: tbf rate 100mbit burst 64kb latency 50ms");
    setup.host.run_with_bpffs(|bpffs| {
        let mut agent = Tended::start(&config(bpffs, Hook::Filter));
        assert!(!agent.add(Role::Tap, "vnet0", true));
        let problem = agent.hooks.problems().remove(0);
        assert!(problem.contains("`tbf`"), "{problem}");
        assert!(problem.contains("tc qdisc del dev vnet0 root"), "{problem}");
        assert!(
            agent.views(setup.ifindex).is_empty(),
            "no half-attached port"
        );
        assert!(!limits.show("qdisc show dev TAP").contains("ingress"));
        assert_eq!(agent.hooks.counters()[2], ("ports_refused", 1));
        agent.catch_up();
        let is_refused = |agent: &Tended| {
            let mut ports = agent.hooks.ports();
            ports.any(|port| matches!(port.state, State::Refused { .. }))
        };
        assert!(is_refused(&agent), "nothing of its own makes it try again");
        limits.must("qdisc del dev TAP root");
        agent.until("another attempt", |agent| !is_refused(agent));
        agent.until_attached();
        assert_both_work(&setup, &agent.datapath, 1);
    });
}

#[test]
fn uplink_whose_ingress_is_taken_is_refused_in_one_sentence() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    command(
        "tc",
        &[
            "-n",
            setup.host.name(),
            "qdisc",
            "add",
            "dev",
            "up0",
            "ingress",
        ],
    );
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs, Hook::Filter)).unwrap();
        let up0 = setup.host.ifindex("up0");
        let error = datapath.attach_uplink(up0, "up0").unwrap_err().to_string();
        assert!(error.contains("leak to up0"), "{error}");
        assert!(error.contains("tc qdisc add dev up0 clsact"), "{error}");
        assert_eq!(datapath.attachments(), []);
    });
}

#[test]
fn tap_that_is_gone_is_refused_and_leaves_nothing() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let host = Namespace::new("host");
        let tap = host.run(|| tap::open("vnet0"));
        host.run_with_bpffs(|bpffs| {
            let datapath = Datapath::load(&config(bpffs, hook)).unwrap();
            let ifindex = host.ifindex("vnet0");
            drop(tap);
            let error = datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap_err();
            assert!(matches!(error, DatapathError::Attach { .. }), "{error}");
            assert!(error.to_string().contains("vnet0"), "{error}");
            assert_eq!(datapath.attachments(), []);
            assert!(matches!(
                datapath.usage(ifindex),
                Err(DatapathError::NoPort(_))
            ));
            assert!(datapath.lost(ifindex).unwrap().is_empty());
            datapath.detach_port(ifindex).unwrap();
        });
    }
}

#[test]
fn gate_on_a_root_qdisc_sends_no_probes() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs, Hook::Filter));
        assert!(!datapath.takes_probes(setup.ifindex));
        datapath.gate_record(setup.ifindex, true).unwrap();
        let (gate, _) = datapath.gate(setup.ifindex).unwrap().unwrap();
        assert_eq!(gate.probes, 0, "the kernel would wait for itself");
    });
}
