-- Begins the installation, which is one transaction: installers take turns, and from here on every name means the
-- first schema of the installer's search_path, never a temporary table.
--
-- Raises   invalid_schema_name (3F000)               search_path names no schema that exists
--          object_not_in_prerequisite_state (55000)  the database is the front of shards
DO $$
DECLARE
    v_other record;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE invalid_schema_name
            USING MESSAGE = 'search_path names no schema that exists: expected the one to install into';
    END IF;
    IF EXISTS (SELECT FROM pg_foreign_server s WHERE s.srvname = 'beacon_stop') THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = 'this database is a PL/Proxy front, whose jobs are on shards: expected one of these',
                  HINT = 'A front gets sql/plproxy/router.sql instead.';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    RAISE NOTICE USING
        MESSAGE = format('Beacon Stop goes into schema %I of database %I', current_schema(), current_database());

    -- The functions will not see tables that are further on in search_path.
    FOR v_other IN
        SELECT c.relname AS table_name, c.relnamespace::regnamespace AS schema
        FROM pg_class c
        WHERE c.oid IN (to_regclass('jobs'), to_regclass('executions')) AND c.relpersistence <> 't'
          AND c.relnamespace <> quote_ident(current_schema())::regnamespace
        ORDER BY c.relname
    LOOP
        RAISE WARNING USING
            MESSAGE = format('a new table %s is made in schema %I, although schema %s has one already',
                             v_other.table_name, current_schema(), v_other.schema),
            HINT = format('If that one is meant, put %s first in search_path and install again.', v_other.schema);
    END LOOP;

    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
    PERFORM set_config('quote_all_identifiers', 'off', true);
END;
$$;
