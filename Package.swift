// swift-tools-version: 6.2
import PackageDescription

let strict: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
]

/// Targets of the data path: all state has one thread, which unit tests and debug builds check; release builds need not
/// count every access to a class's properties again, and may inline across modules.
let dataPath =
    strict + [
        .unsafeFlags(
            ["-enforce-exclusivity=unchecked", "-cross-module-optimization"], .when(configuration: .release))
    ]

/// Rules of the engine can be left out, to show that the simulator sees that: in a build of its own (`make test-simulation`).
let faults: [SwiftSetting] = Context.environment["FARCOPY_FAULTS"] == nil ? [] : [.define("DELIBERATE_FAULTS")]

/// Targets over NIO, whose members come from many modules.
let control: [SwiftSetting] = [.enableUpcomingFeature("ExistentialAny")]

let package = Package(
    name: "farcopy",
    products: [
        .executable(name: "farcopy", targets: ["farcopy"])
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.0"),
        .package(url: "https://github.com/LebJe/TOMLKit", from: "0.6.0"),
        .package(url: "https://github.com/hummingbird-project/hummingbird", from: "2.28.0"),
        .package(url: "https://github.com/swift-server/async-http-client", from: "1.37.0"),
        .package(url: "https://github.com/apple/swift-nio-ssl", from: "2.37.0"),
    ],
    targets: [
        .systemLibrary(
            name: "CLibURing", pkgConfig: "liburing", providers: [.apt(["liburing-dev"])]),
        .systemLibrary(name: "CLibNBD", pkgConfig: "libnbd", providers: [.apt(["libnbd-dev"])]),

        .systemLibrary(name: "CGnuTLS", pkgConfig: "gnutls", providers: [.apt(["libgnutls28-dev"])]),
        .systemLibrary(name: "CNetlink", pkgConfig: "libnl-genl-3.0", providers: [.apt(["libnl-genl-3-dev"])]),

        .target(name: "Base", swiftSettings: dataPath),
        .target(name: "TLS", dependencies: ["CGnuTLS"], swiftSettings: strict),
        .target(name: "NBDProtocol", dependencies: ["Base"], swiftSettings: dataPath),
        .target(name: "Volumes", dependencies: ["Base"], swiftSettings: dataPath + faults),
        .target(name: "Ring", dependencies: ["Base", "CLibURing"], swiftSettings: dataPath),
        .target(
            name: "NBDServer", dependencies: ["Base", "NBDProtocol", "Volumes", "Ring", "TLS"],
            swiftSettings: dataPath),
        // Decides, and does nothing: no I/O, no clock.
        .target(name: "Groups", dependencies: ["Base"], swiftSettings: strict),
        // The same for the FlashCopies of volumes.
        .target(name: "FlashCopies", dependencies: ["Base", "Groups", "Volumes"], swiftSettings: strict),
        .target(
            name: "Link",
            dependencies: ["Base", "Groups", "Volumes", "Ring", "NBDProtocol", "NBDServer", "TLS", "CLibNBD"],
            swiftSettings: strict),
        .target(
            name: "API",
            dependencies: [
                "Base", "Groups", "NBDProtocol", .product(name: "AsyncHTTPClient", package: "async-http-client"),
            ], swiftSettings: control),
        // Which host of a group coordinates it.
        .target(
            name: "Etcd",
            dependencies: [
                .product(name: "AsyncHTTPClient", package: "async-http-client"),
                .product(name: "NIOSSL", package: "swift-nio-ssl"),
            ], swiftSettings: control),
        .target(
            name: "SiteConfiguration",
            dependencies: [
                "Base", "CLibURing", "Etcd", "Groups", "Link", "NBDProtocol", "NBDServer", "Ring", "TLS", "Volumes",
                .product(name: "TOMLKit", package: "TOMLKit"),
            ], swiftSettings: control),
        .target(
            name: "Site",
            dependencies: [
                "API", "Base", "CLibURing", "Etcd", "FlashCopies", "Groups", "Link", "NBDProtocol", "NBDServer", "Ring",
                "SiteConfiguration", "TLS", "Volumes",
                .product(name: "Logging", package: "swift-log"),
            ], swiftSettings: control),
        .target(
            name: "APIServer",
            dependencies: [
                "API", "Base", "Groups", "NBDProtocol", "Site", "SiteConfiguration",
                .product(name: "Hummingbird", package: "hummingbird"), .product(name: "Logging", package: "swift-log"),
            ], swiftSettings: control),
        .target(name: "KernelDevice", dependencies: ["Ring", "CLibNBD", "CNetlink"], swiftSettings: strict),
        .executableTarget(
            name: "farcopy",
            dependencies: [
                "API", "APIServer", "Groups", "KernelDevice", "NBDProtocol", "Ring", "Site", "SiteConfiguration",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
                .product(name: "Logging", package: "swift-log"),
            ], swiftSettings: control),
        .target(
            name: "Simulation", dependencies: ["Base", "FlashCopies", "Groups", "Volumes"],
            swiftSettings: dataPath),
        .executableTarget(
            name: "simulate",
            dependencies: ["Simulation"], swiftSettings: strict),

        .testTarget(name: "BaseTests", dependencies: ["Base"], swiftSettings: strict),
        .testTarget(name: "NBDProtocolTests", dependencies: ["NBDProtocol"], swiftSettings: strict),
        .testTarget(name: "VolumesTests", dependencies: ["Volumes"], swiftSettings: strict),
        .testTarget(name: "RingTests", dependencies: ["Ring"], swiftSettings: strict),
        .testTarget(
            name: "NBDServerTests", dependencies: ["Base", "NBDServer", "NBDProtocol", "Ring", "Volumes", "CLibURing"],
            swiftSettings: strict),
        .testTarget(
            name: "GroupsTests", dependencies: ["FlashCopies", "Groups", "Volumes"], swiftSettings: strict),
        .testTarget(
            name: "FlashCopiesTests", dependencies: ["FlashCopies", "Groups", "Volumes"], swiftSettings: strict),
        .testTarget(name: "LinkTests", dependencies: ["Link"], swiftSettings: strict),
        .testTarget(name: "APITests", dependencies: ["API"], swiftSettings: control),
        .testTarget(
            name: "SiteTests", dependencies: ["API", "Site", "SiteConfiguration"], swiftSettings: control),
        .testTarget(name: "SimulationTests", dependencies: ["Simulation"], swiftSettings: strict),
    ],
    swiftLanguageModes: [.v6]
)

// libFuzzer brings its own entry point, so these build only with `--sanitize fuzzer` (see `make fuzz`).
if Context.environment["FARCOPY_FUZZ"] != nil {
    package.targets += [
        .executableTarget(
            name: "fuzz-handshake", dependencies: ["Base", "NBDProtocol"], path: "Fuzz/handshake",
            swiftSettings: strict + [.unsafeFlags(["-parse-as-library"])]),
        .executableTarget(
            name: "fuzz-session", dependencies: ["Base", "NBDProtocol", "NBDServer", "Ring", "Volumes"],
            path: "Fuzz/session", swiftSettings: strict + [.unsafeFlags(["-parse-as-library"])]),
    ]
}

// `make test-asan`: the sanitizer in our own modules; the dependencies stay as they were built for everything else.
if let sanitizer = Context.environment["FARCOPY_SANITIZE"] {
    for target in package.targets where target.type == .regular || target.type == .executable {
        target.swiftSettings = (target.swiftSettings ?? []) + [.unsafeFlags(["-sanitize=\(sanitizer)"])]
        target.linkerSettings = [.unsafeFlags(["-sanitize=\(sanitizer)"])]
    }
}
