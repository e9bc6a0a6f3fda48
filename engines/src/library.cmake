# tstitch::step, the C library, and what find_package(tstitch) needs.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_library(tstitch_step step_c.cpp ${objects})
add_library(tstitch::step ALIAS tstitch_step)
set_target_properties(
  tstitch_step
  PROPERTIES EXPORT_NAME step
             VERSION ${PROJECT_VERSION}
             SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
             POSITION_INDEPENDENT_CODE ON
             CXX_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON)
if(BUILD_SHARED_LIBS)
  target_compile_definitions(tstitch_step PRIVATE TSTITCH_EXPORTS)
  # The standard library's templates are visible whatever the compiler was told.
  target_link_options(tstitch_step PRIVATE "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/exports.map")
  set_target_properties(tstitch_step PROPERTIES LINK_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/exports.map")
endif()
target_include_directories(tstitch_step PUBLIC $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>
                                               $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(tstitch_step PRIVATE $<BUILD_INTERFACE:tstitch_options> Threads::Threads)
if(NOT BUILD_SHARED_LIBS) # so that a project in C alone can link it
  foreach(runtime stdc++ c++)
    if(runtime IN_LIST CMAKE_CXX_IMPLICIT_LINK_LIBRARIES)
      target_link_libraries(tstitch_step PRIVATE $<INSTALL_INTERFACE:${runtime}>)
    endif()
  endforeach()
endif()

set(package "${CMAKE_INSTALL_LIBDIR}/cmake/tstitch")
set(fatbin_name "")
if(TSTITCH_FATBIN)
  set(fatbin_name step_kernels.fatbin)
  install(FILES "${TSTITCH_FATBIN}" DESTINATION "${CMAKE_INSTALL_DATADIR}/tstitch")
endif()
set(data_dir "${CMAKE_INSTALL_DATADIR}/tstitch")
configure_package_config_file(tstitchConfig.cmake.in "${CMAKE_CURRENT_BINARY_DIR}/tstitchConfig.cmake"
                              INSTALL_DESTINATION "${package}" PATH_VARS data_dir)
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/tstitchConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(TARGETS tstitch_step EXPORT tstitch)
install(DIRECTORY include/ DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT tstitch NAMESPACE tstitch:: FILE tstitchTargets.cmake DESTINATION "${package}")
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/tstitchConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/tstitchConfigVersion.cmake" DESTINATION "${package}")
