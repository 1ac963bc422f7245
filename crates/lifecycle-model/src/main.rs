//! `dormouse-lifecycle-model [FILE]`: exhausts all scopes of the model, plants every bug, prints the tables, and writes
//! them to FILE as JSON. Ends with status 0 only if no rule is broken, every bug is caught and every event was seen in
//! every phase.

use std::process::ExitCode;

use dormouse_lifecycle_model::report::Report;
use dormouse_lifecycle_model::scope;

fn main() -> ExitCode {
    let mut report = Report::default();
    for scope in scope::all() {
        let name = scope.name;
        match report.exhaust(scope) {
            Ok(exhausted) => eprintln!("{name}: {} states, {:.1?}", exhausted.walk.states, exhausted.took),
            Err(violation) => {
                eprintln!("{name}: {}", violation.rule);
                violation.path.iter().for_each(|made| eprintln!("  {made:?}"));
                return ExitCode::FAILURE;
            }
        }
    }
    report.plant_all();
    println!("{}", report.tables());
    if let Some(file) = std::env::args_os().nth(1)
        && let Err(error) = std::fs::write(&file, format!("{:#}\n", report.json()))
    {
        eprintln!("the results can't be written to {}: {error}", file.display());
        return ExitCode::FAILURE;
    }
    let faults = report.faults();
    faults.iter().for_each(|fault| eprintln!("{fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
