// StateCommands.swift: commands on what lies on disk, without a running site.

import ArgumentParser
import Glibc
import Site

struct Inspect: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Print what a record, a bitmap file, an activity log or a whole state directory holds; changes nothing.")
    @Argument(help: "A file of the state directory, or the directory.") var path: String
    func run() throws { for line in try Inspection.describe(path) { Output.line(line) } }
}

struct Adopt: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "With the site stopped: accept a volume's file that was exchanged or written to by others.",
        discussion: "Its FlashCopies are lost and its recovery points void; a mirror is compared anew.")
    @Option(help: "The site's TOML file.") var config: String
    @Argument(help: "The volume.") var volume: String
    func run() throws {
        Output.line(try Adoption.adopt(volume, try Serve.configuration(at: config)))
    }
}
