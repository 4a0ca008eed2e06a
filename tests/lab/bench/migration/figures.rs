//! The paper's figures 8 to 11 as bars, with the paper's numbers beside this project's.

use super::{Load, MigrationReport, MigrationSetting, MigrationWay, Span, Way, paper};
use crate::bench::picture::{Bar, Kind, Panel, svg};
use crate::probe::report::RunRow;

/// Rate of the streams of Fig. 8, Mbit/s.
const FIG_8_MBPS: f64 = 20.0;

/// A figure of the paper, drawn from this project's measurements.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Number of the figure in the paper.
    pub number: u32,
    /// SVG document.
    pub svg: String,
}

/// Draws the figures for which the report has measurements.
#[must_use]
pub fn draw(report: &MigrationReport) -> Vec<Figure> {
    let drawn = [
        (
            8,
            "how long a stream is frozen by a move, seconds",
            freezes(report),
        ),
        (9, "the same by the stream's rate, GLM", by_rate(report)),
        (
            10,
            "signalling before the copy, milliseconds; the paper gives no numbers",
            times(report, Unit::Milliseconds, &[Way::Glm], |row| {
                row.signalling_ms
            }),
        ),
        (
            11,
            "copy of memory, seconds; the paper gives no numbers",
            times(report, Unit::Seconds, &Way::ALL, |row| row.copy_ms),
        ),
    ];
    drawn
        .into_iter()
        .filter(|(_, _, panels)| !panels.is_empty())
        .map(|(number, what, panels)| Figure {
            number,
            svg: svg(&format!("Fig. {number}: {what}"), &panels),
        })
        .collect()
}

#[derive(Clone, Copy)]
enum Unit {
    Seconds,
    Milliseconds,
}

impl Unit {
    /// Converts milliseconds to this unit. Returns the number and its text.
    fn of(self, ms: f64) -> (f64, String) {
        match self {
            Self::Seconds => (ms / 1e3, format!("{:.2}", ms / 1e3)),
            Self::Milliseconds => (ms, format!("{ms:.1}")),
        }
    }
}

/// Returns a bar as long as the mean. Its text adds minimum and maximum.
fn bar(name: String, span: Span, unit: Unit, kind: Kind) -> Bar {
    let (value, mean) = unit.of(span.mean);
    let ((_, min), (_, max)) = (unit.of(span.min), unit.of(span.max));
    Bar {
        name,
        value,
        text: format!("{mean} ({min} to {max})"),
        kind,
    }
}

fn way_bar(way: &MigrationWay, unit: Unit, of: impl Fn(&RunRow) -> f64) -> Bar {
    let kind = match way.way {
        Way::Glm => Kind::Own,
        Way::Lm => Kind::Reference,
        Way::Baseline => Kind::Other,
    };
    bar(way.way.name().to_owned(), way.span(of), unit, kind)
}

/// Returns a bar for a result of the paper, in seconds.
fn paper_bar(name: &str, mean: f64, span: Option<Span>) -> Bar {
    let range = span.map_or_else(String::new, |span| {
        format!(" ({:.2} to {:.2})", span.min, span.max)
    });
    Bar {
        name: name.to_owned(),
        value: mean,
        text: format!("{mean:.2}{range}"),
        kind: Kind::Reference,
    }
}

fn load(setting: &MigrationSetting) -> Load {
    Load {
        memory_mib: setting.memory_mib,
        rate_mbps: setting.rate_mbps,
    }
}

fn ways(setting: &MigrationSetting) -> impl Iterator<Item = &MigrationWay> {
    Way::ALL.into_iter().filter_map(|way| setting.way(way))
}

/// Returns the panels of Fig. 8, one for each size of memory.
fn freezes(report: &MigrationReport) -> Vec<Panel> {
    let settings = report.settings.iter().filter(|setting| {
        (setting.rate_mbps - FIG_8_MBPS).abs() < f64::EPSILON && ways(setting).next().is_some()
    });
    settings
        .map(|setting| {
            let measured =
                ways(setting).map(|way| way_bar(way, Unit::Seconds, |row| row.freeze_ms));
            let mut bars: Vec<Bar> = measured.collect();
            let glm = paper::outage(load(setting));
            let mean = glm.map_or(paper::GLM_OUTAGE, |span| span.mean);
            bars.push(paper_bar("paper: GLM", mean, glm));
            bars.push(paper_bar("paper: LM, all sizes", paper::LM_OUTAGE, None));
            Panel {
                title: format!("{} MiB, {FIG_8_MBPS} Mbit/s", setting.memory_mib),
                bars,
            }
        })
        .collect()
}

/// Returns the sizes of memory, in the report's order.
fn sizes(report: &MigrationReport) -> Vec<u32> {
    let mut sizes: Vec<u32> = Vec::new();
    for setting in &report.settings {
        if !sizes.contains(&setting.memory_mib) {
            sizes.push(setting.memory_mib);
        }
    }
    sizes
}

/// Returns one panel for each size of memory. `bars` returns the bars of each setting of that size.
fn by_size(report: &MigrationReport, bars: impl Fn(&MigrationSetting) -> Vec<Bar>) -> Vec<Panel> {
    let panel = |size: u32| {
        let of_size = |setting: &&MigrationSetting| setting.memory_mib == size;
        let settings = report.settings.iter().filter(of_size);
        Panel {
            title: format!("{size} MiB"),
            bars: settings.flat_map(&bars).collect(),
        }
    };
    let panels = sizes(report).into_iter().map(panel);
    panels.filter(|panel| !panel.bars.is_empty()).collect()
}

/// Returns the panels of Fig. 9: one for each size of memory, with bars for the rates.
fn by_rate(report: &MigrationReport) -> Vec<Panel> {
    by_size(report, |setting| {
        let Some(glm) = setting.way(Way::Glm) else {
            return Vec::new();
        };
        let rate = setting.rate_mbps;
        let span = glm.span(|row| row.freeze_ms);
        let mut bars = vec![bar(
            format!("{rate} Mbit/s"),
            span,
            Unit::Seconds,
            Kind::Own,
        )];
        if let Some(span) = paper::outage(load(setting)) {
            let name = format!("paper: {rate} Mbit/s");
            bars.push(paper_bar(&name, span.mean, Some(span)));
        }
        bars
    })
}

/// Returns the panels of Figs. 10 and 11: one for each size of memory, with bars for rates and
/// methods.
fn times(
    report: &MigrationReport,
    unit: Unit,
    shown: &[Way],
    of: impl Fn(&RunRow) -> f64,
) -> Vec<Panel> {
    by_size(report, |setting| {
        let these = ways(setting).filter(|way| shown.contains(&way.way));
        these
            .map(|way| {
                let bar = way_bar(way, unit, &of);
                Bar {
                    name: format!("{} Mbit/s, {}", setting.rate_mbps, bar.name),
                    ..bar
                }
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::setting;
    use super::*;
    use crate::bench::Machine;

    #[test]
    fn figures_have_what_was_measured_beside_the_papers_numbers() {
        let report = MigrationReport {
            machine: Machine {
                kernel: "6".to_owned(),
                processor: "one".to_owned(),
                cpus: 2,
            },
            accelerator: "tcg".to_owned(),
            settings: vec![setting(128, 2.0), setting(128, 20.0), setting(256, 100.0)],
            failures: Vec::new(),
        };
        let figures = draw(&report);
        let numbers: Vec<u32> = figures.iter().map(|figure| figure.number).collect();
        assert_eq!(numbers, [8, 9, 10, 11]);
        let [eighth, ninth, tenth, eleventh] = &figures[..] else {
            panic!("{numbers:?}");
        };
        for (text, times) in [
            ("128 MiB, 20 Mbit/s", 1),
            ("0.20 (0.18 to 0.22)", 1),
            ("0.14 (0.10 to 0.22)", 1),
            ("paper: LM, all sizes", 1),
            ("libvirt alone", 0),
        ] {
            assert_eq!(eighth.svg.matches(text).count(), times, "{text}");
        }
        // Three bars are measured and two are the paper's, which has no result at 100 Mbit/s.
        assert_eq!(ninth.svg.matches("<rect").count(), 1 + 5);
        assert_eq!(tenth.svg.matches("<rect").count(), 1 + 3);
        assert_eq!(eleventh.svg.matches("<rect").count(), 1 + 6);
    }
}
