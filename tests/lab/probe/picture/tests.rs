//! Tests of [`super`].

use super::*;

const MS: u64 = 1_000_000;

#[test]
fn picture_is_well_formed_and_counts_what_it_shows() {
    let sent: Vec<_> = (0..2000)
        .map(|n| Sent {
            flow: 0,
            sequence: n,
            sent_ns: u64::from(n) * MS,
        })
        .collect();
    let arrival = |n: u32, host| Arrival {
        flow: 0,
        sequence: n,
        host_ns: u64::from(n) * MS + if host == 0 { 0 } else { 100 * MS },
        host,
    };
    let mut arrivals: Vec<_> = (0..1000).map(|n| arrival(n, 0)).collect();
    arrivals.extend((950..1400).chain(1450..1800).map(|n| arrival(n, 1)));
    let phases = [
        ("signalling", 600, 640),
        ("copy", 640, 980),
        ("pause", 980, 1050),
    ]
    .map(|(name, from, to)| Phase {
        name: name.to_owned(),
        from_ns: from * MS,
        to_ns: to * MS,
    });
    let picture = svg(&Picture {
        title: "A <move> & its stream",
        sent: &sent,
        arrivals: &arrivals,
        flow: 0,
        hosts: &["vms1", "vms2"],
        phases: &phases,
        marks: &[Mark {
            name: "first packet".to_owned(),
            at_ns: 1050 * MS,
        }],
        window: Window {
            from_ns: 400 * MS,
            to_ns: 1800 * MS,
        },
    });
    assert!(picture.contains("received again (50)"));
    assert!(picture.contains("lost (50)"));
    assert!(picture.contains("A &lt;move&gt; &amp; its stream"));
    for element in ["<svg", "</svg>", "signalling 40 ms", "host time in ms"] {
        assert!(picture.contains(element), "{element}");
    }
    assert!(picture.len() < 200_000, "{} bytes", picture.len());
}

#[test]
fn empty_run_is_drawn_too() {
    let window = Window {
        from_ns: 5,
        to_ns: 5,
    };
    let picture = svg(&Picture {
        title: "",
        sent: &[],
        arrivals: &[],
        flow: 0,
        hosts: &[],
        phases: &[],
        marks: &[],
        window,
    });
    assert!(!picture.contains("NaN") && !picture.contains("inf"));
}

#[test]
fn packets_older_than_the_window_stay_inside_the_picture() {
    let sent = [1000, 1100].map(|n| Sent {
        flow: 0,
        sequence: n,
        sent_ns: u64::from(n) * MS,
    });
    let old = Arrival {
        flow: 0,
        sequence: 10,
        host_ns: 1050 * MS,
        host: 0,
    };
    let picture = svg(&Picture {
        title: "",
        sent: &sent,
        arrivals: &[old],
        flow: 0,
        hosts: &["vms1"],
        phases: &[],
        marks: &[],
        window: Window {
            from_ns: 1000 * MS,
            to_ns: 1101 * MS,
        },
    });
    let bottom = format!(" {:.1}h0", HEIGHT - BOTTOM);
    assert!(picture.contains(&bottom), "{picture}");
}

#[test]
fn ticks_are_round_numbers() {
    assert_eq!(
        ticks(-30.0, 420.0),
        [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]
    );
}
